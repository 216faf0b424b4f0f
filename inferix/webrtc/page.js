"use strict";
const at = id => document.getElementById(id);
const say = (id, text) => { if (at(id).textContent !== text) at(id).textContent = text; };
const sleep = ms => new Promise(done => setTimeout(done, ms));
const video = at("video"), canvas = at("canvas");
const words = { loading: "Loading", waiting: "Waiting for a viewer", generating: "Generating", paused: "Paused", idle: "Done", closing: "Closing", gone: "Server stopped" };
const PATIENCE = 2500;  // milliseconds in which WebRTC has to connect
let state = { status: "loading", files: [], history: [] };
let connection = null, connected = false, overHttp = !window.RTCPeerConnection, obstacle = "";
let shownFiles = "", shownHistory = "";

class Refusal extends Error {}
async function request(path, body, type = "application/json") {
  const data = type === "application/json" ? JSON.stringify(body) : body;
  const response = await fetch(path, body && { method: "POST", headers: { "Content-Type": type }, body: data });
  if (!response.ok) throw Object.assign(new Refusal(await response.text()), { status: response.status });
  return response.json();
}

// The video: by WebRTC, or, where that does not connect in time, as JPEG images over a WebSocket. Made again when it ends.
async function connect() {
  for (;;) {
    const mine = connection = {};
    connected = false;
    const reason = await (overHttp ? watchHttp(mine) : watchWebRtc(mine));
    if (mine !== connection) return;
    if (reason === null) { overHttp = true; continue; }
    obstacle = reason;
    show();
    await sleep(reason ? 5000 : 1000);
    if (mine !== connection) return;
  }
}
function disconnect() {
  const old = connection;
  connection = null;
  old?.close?.();
}

// Both return why there is no video, "" where it has ended, null where the other way is to be tried.
async function watchWebRtc(mine) {
  const peer = new RTCPeerConnection(), tooLate = sleep(PATIENCE);
  mine.close = () => peer.close();
  peer.addTransceiver("video", { direction: "recvonly" });
  peer.ontrack = ({ track, receiver }) => {
    receiver.jitterBufferTarget = 0;  // show frames as they come
    video.srcObject = new MediaStream([track]);
  };
  const changes = new EventTarget();
  peer.onconnectionstatechange = () => changes.dispatchEvent(new Event(peer.connectionState));
  const becomes = name => new Promise(done => changes.addEventListener(name, () => done(name), { once: true }));
  const up = becomes("connected"), failed = becomes("failed");
  try {
    await peer.setLocalDescription();
    // The server's address is enough to meet, so waiting long for our own is no use.
    const gathered = new Promise(done => peer.addEventListener("icegatheringstatechange", () => peer.iceGatheringState === "complete" && done()));
    await Promise.race([gathered, sleep(200)]);
    const answer = await request("offer", { sdp: peer.localDescription.sdp });
    await peer.setRemoteDescription(answer);
    if (await Promise.race([up, failed, tooLate]) !== "connected") return null;
    useElement(video);
    await failed;
    return "";
  } catch (error) {
    if (error instanceof Refusal) return error.message;
    return error instanceof TypeError ? "" : null;  // the server is gone; or the browser's WebRTC is off or broken
  } finally {
    connected = false;
    peer.close();
  }
}
async function watchHttp(mine) {
  const socket = new WebSocket(new URL("video", location).href.replace(/^http/, "ws"));
  mine.close = () => socket.close();
  socket.binaryType = "blob";
  socket.onopen = () => useElement(canvas);
  let drawing = Promise.resolve();
  socket.onmessage = ({ data }) => drawing = drawing.then(async () => {
    const image = await createImageBitmap(data);
    if (canvas.width !== image.width || canvas.height !== image.height) {
      [canvas.width, canvas.height] = [image.width, image.height];
      setAspect(image.width / image.height);
    }
    canvas.getContext("2d").drawImage(image, 0, 0);
    image.close();
    onFrame(performance.now());
    if (socket.readyState === WebSocket.OPEN) socket.send("");  // ready for another one
  }).catch(() => socket.close());
  const { code, reason } = await new Promise(done => socket.onclose = done);
  const opened = connected;
  connected = false;
  return code === 1013 ? reason : opened || state.status === "gone" ? "" : "the video does not get through to this browser";
}
function useElement(element) {
  connected = true;
  obstacle = "";
  for (const each of [video, canvas]) each.hidden = each !== element;
  show();
}
addEventListener("pagehide", disconnect);  // else the server would notice late
addEventListener("pageshow", event => { if (event.persisted) connect(); });

const played = [];
function onFrame(now) {
  if (!played.length) performance.mark("first-frame");
  played.push(now);
  while (played[0] < now - 2000) played.shift();
  at("stage").classList.add("playing");
}
const setAspect = ratio => at("stage").style.setProperty("--aspect", ratio);
video.requestVideoFrameCallback?.(function next(now) { onFrame(now); video.requestVideoFrameCallback(next); });
video.addEventListener("playing", () => at("stage").classList.add("playing"));
video.addEventListener("resize", () => setAspect(video.videoWidth / video.videoHeight));

// What is going on, asked for twice a second.
async function follow() {
  for (let failures = 0; ; ) {
    try {
      const known = state.status !== "gone";
      state = await request("state");
      failures = 0;
      if (!known) { disconnect(); connect(); }
    } catch (error) {
      if (error.status === 401) location.reload();  // asks for the token
      if (++failures >= 3) state = { ...state, status: "gone" };
    }
    show();
    await sleep(failures ? 1000 : 500);
  }
}

function message() {
  const playing = at("stage").classList.contains("playing");
  if (state.status === "gone") return "The server has stopped";
  if (obstacle) return `No video: ${obstacle}`;
  if (state.status === "loading") return "Loading the model…";
  if (!connected) return playing ? "The video was interrupted: connecting again…" : overHttp ? "Connecting to the video over HTTP…" : "Connecting to the video…";
  if (state.status === "paused") return "Paused";
  if (!playing) return state.status === "idle" ? "Nothing to show yet" : "Generating the first frames…";
  if (state.holding) return "Holding the last frame: generation is slower than playback";
  return "";
}

function change() {  // what becomes of the prompt that was sent last
  const { prompt, prompt_block: since, next_prompt: next, next_prompt_block: from, playing_prompt: playing, response_seconds: seconds } = state;
  if (next) return `${from ? `From block ${from}` : "In the next video"}: ${next}`;
  if (state.status === "idle") return "";
  if (prompt && playing && prompt !== playing) return `From block ${since}, which comes next: ${prompt}`;
  return since > 1 ? `Shown since block ${since}${seconds ? `, ${seconds.toFixed(1)} s after Send` : ""}` : "";
}

function show() {
  const { status, block, blocks, files, history } = state;
  const busy = status === "generating" || status === "paused", over = status === "gone" || status === "closing";
  document.body.dataset.status = status;
  const prompt = busy && state.playing_prompt || state.prompt;
  document.title = prompt ? `${words[status]} · ${prompt}` : "Inferix live";
  say("status", words[status]);
  say("message", message());
  say("problem", state.problem ? `${state.problem}. The video goes on without this file.` : "");
  say("transport", overHttp && connected ? "Video over HTTP, because WebRTC does not get through to this browser" : "");
  say("prompt", prompt ?? "");
  say("next", change());
  say("note", state.note ?? "");
  say("block", block ? `Block ${block}${blocks ? ` of ${blocks}` : ""}` : "");
  at("progress").max = blocks || 1;
  at("progress").value = blocks ? block : 0;
  at("progress").style.setProperty("--blocks", blocks <= 60 ? blocks || 1 : 1);
  say("hint", busy && !state.has_image ? "From the next block on" : "What comes next");
  say("pause", status === "paused" ? "Resume" : "Pause");
  at("pause").disabled = at("stop").disabled = !busy;
  at("end").disabled = document.querySelector("#form .main").disabled = over;
  at("upload").hidden = !state.can_start_from_image || state.has_image;
  at("image").hidden = !state.has_image;
  at("story").hidden = !state.prompt || over;

  while (played[0] < performance.now() - 2000) played.shift();
  say("quantization", state.quantization ?? "–");
  say("weights", state.weight_mb ? `${state.weight_mb.toLocaleString()} MB` : "–");
  say("generated", state.generation_fps ? `${state.generation_fps} fps` : "–");
  at("generated").className = state.holding ? "warn" : "";
  const rate = played.length > 1 ? (played.length - 1) * 1000 / (played.at(-1) - played[0]) : 0;
  say("played", `${rate.toFixed(1)} of ${state.playback_fps ?? 16} fps`);
  say("first", state.first_frame_seconds ? `${state.first_frame_seconds.toFixed(2)} s` : "–");
  say("response", state.response_seconds ? `${state.response_seconds.toFixed(2)} s` : "–");
  say("queued", state.queued_seconds === undefined ? "–" : `${state.queued_seconds.toFixed(1)} s`);
  say("dropped", `${state.dropped ?? "–"}`);
  at("dropped").className = state.dropped ? "warn" : "";
  say("viewers", `${state.viewers ?? "–"}`);

  const listing = JSON.stringify(files);
  if (files.length && listing !== shownFiles) {  // else a focused link would lose its focus
    shownFiles = listing;
    at("files").replaceChildren(...files.map(({ name, bytes }) => {
      const link = document.createElement("a"), size = document.createElement("span");
      link.href = `files/${encodeURIComponent(name)}`;
      link.textContent = name;
      size.textContent = `${(bytes / 1e6).toFixed(2)} MB`;
      return item(link, size);
    }));
  }
  at("again").hidden = !history.length;
  if (JSON.stringify(history) !== shownHistory) {
    shownHistory = JSON.stringify(history);
    const focused = document.activeElement.closest("#history") && document.activeElement.textContent;
    at("history").replaceChildren(...history.toReversed().map(text => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => send(text));
      return item(button);
    }));
    if (focused) [...at("history").querySelectorAll("button")].find(button => button.textContent === focused)?.focus();
  }
}
function item(...children) {
  const element = document.createElement("li");
  element.append(...children);
  return element;
}

async function act(...call) {
  say("error", "");
  try {
    state = await request(...call);
    show();
    return true;
  } catch (error) {
    say("error", error instanceof Refusal ? error.message : "The server cannot be reached");
  }
}
function send(prompt) {
  const blend = at("blend").value;
  return act("prompt", blend ? { prompt, blend: Number(blend) } : { prompt });
}
at("form").addEventListener("submit", async event => {
  event.preventDefault();
  if (await send(at("typed").value)) at("typed").value = "";
});
at("typed").addEventListener("keydown", event => {  // Enter sends, Shift+Enter makes a new line
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("file").addEventListener("change", async () => {
  const [file] = at("file").files;
  at("file").value = "";
  if (!file || !await act("image", file, file.type || "application/octet-stream")) return;
  URL.revokeObjectURL(at("thumbnail").src);
  at("thumbnail").src = URL.createObjectURL(file);
  at("typed").focus();
});
at("remove").addEventListener("click", async () => { if (await act("image", new Blob(), "image/png")) at("file").focus(); });
at("pause").addEventListener("click", () => act("control", { action: state.status === "paused" ? "resume" : "pause" }));
at("stop").addEventListener("click", () => act("control", { action: "stop" }));
at("end").addEventListener("click", () => { at("sure").returnValue = ""; at("sure").showModal(); });
at("sure").addEventListener("close", () => { if (at("sure").returnValue === "close") act("control", { action: "close" }); });

connect();
follow();
