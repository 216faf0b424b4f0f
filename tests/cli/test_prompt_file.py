"""Prompt files: what is in them, and what is refused, before anything is loaded."""

import json
import sys

import pytest
from scripts import run, self_forcing_env  # noqa: F401

from inferix import InputError
from inferix.cli.file_names import entry_names
from inferix.cli.preflight import parse_arguments

# ruff: noqa: F811


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Write a prompt file and return the parsed flags."""
    monkeypatch.chdir(tmp_path)

    def parse(name: str, content: str | bytes, *flags: str, model: str = "self_forcing"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return parse_arguments(model, ["--prompt_file", name, *flags])

    return parse


def names(args) -> list[str]:
    return [name for names in entry_names(args, args.entries) for name in names]


def test_text(parse):
    args = parse("list.txt", "\ufeffA cat\r\n  A dog; asleep \n\n\n", "--seed", "3", "--quant_type", "int8")
    assert [(entry.prompt, entry.seed, entry.line) for entry in args.entries] == [
        ("A cat", 3, 1),
        ("A dog; asleep", 3, 2),
    ]
    assert names(args) == ["A-cat-3-0-int8", "A-dog-asleep-3-0-int8"]
    assert names(parse("list.txt", "A cat\nA dog\n", model="causvid")) == ["A-cat-0", "A-dog-0"]
    assert names(parse("list.txt", "A cat\nA cat\n", "--save_with_index")) == ["0-0-0", "1-0-0"]


def test_extended_prompts(parse, tmp_path):
    (tmp_path / "long.txt").write_text("A cat, in detail\nA dog, in detail")
    args = parse("list.txt", "A cat\nA dog\n", "--extended_prompt_file", "long.txt")
    assert [entry.model_prompt for entry in args.entries] == ["A cat, in detail", "A dog, in detail"]
    assert names(args) == ["A-cat-0-0", "A-dog-0-0"]


def test_columns(parse, tmp_path):
    (tmp_path / "image.png").touch()
    row = {"id": 7, "prompt": "A cat", "extended_prompt": "A cat, in detail", "seed": 5, "image": "image.png"}
    lines = "\n".join(json.dumps(row) for row in (row, {"prompt": "A dog", "num_output_frames": 6, "seed": None}))
    cells = (
        'id,prompt,extended_prompt,seed,image,num_output_frames\n7,A cat,"A cat, in detail",5,image.png,\n,A dog,,,,6\n'
    )
    for args in (parse("list.jsonl", lines), parse("list.csv", cells)):
        first, second = args.entries
        assert (first.id, first.model_prompt, first.seed, first.num_output_frames) == ("7", "A cat, in detail", 5, 19)
        assert first.image == tmp_path / "image.png" or first.image.samefile(tmp_path / "image.png")
        assert (second.id, second.model_prompt, second.seed, second.num_output_frames) == (None, "A dog", 0, 6)
        assert names(args) == ["7", "A-dog-0-0-latents-6"]


def test_names_that_vbench_expects(parse):
    args = parse("list.jsonl", '{"prompt": "a cat, running", "id": "a cat, running"}', "--num_samples", "5")
    assert names(args) == [f"a cat, running-{sample}" for sample in range(5)]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "", "prompt file a.txt holds no prompt"),
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.txt", "A cat\n\nA dog\n", "a.txt, line 2: it is empty"),
        ("a.txt", "A cat\nA dog\nA cat!\n", "a.txt, line 3: its file name is that of line 1, A-cat-0-0.mp4"),
        ("a.txt", "A cat\n" + "y" * 10**6, "a.txt, line 2: it is longer than 64 kB"),
        ("a.txt", b"A cat\nA d\xf6g\n", "a.txt, line 2: it is not UTF-8"),
        ("a.txt", b"A cat\0\n", "a.txt, line 1: it has control characters"),
        ("a.csv", "prompt,id\nA cat,1\nA dog,1\n", "a.csv, line 3: the id '1' is that of line 2 already"),
        ("a.csv", "prompt,colour\nA cat,red\n", "a.csv, line 2: there is no column 'colour'"),
        ("a.csv", "id,seed\n1,2\n", "a.csv, line 1: it must name the columns"),
        ("a.csv", "prompt,image\nA cat,none.png\n", "a.csv, line 2: the image none.png was not found"),
        ("a.csv", "prompt,seed\nA cat,1\n\nA dog,1\n", "a.csv, line 3: it is empty"),
        ("a.csv", "prompt,seed\nA cat, asleep,1\n", "a.csv, line 2: 3 cells for 2 columns"),
        ("a.csv", 'prompt\n"A cat', "a.csv, line 2: it is not CSV"),
        ("a.csv", "prompt,seed\nA cat,-1\n", "a.csv, line 2: seed must be a whole number from 0, not '-1'"),
        ("a.jsonl", '{"prompt": "A cat"}\n{"prompt":\n', "a.jsonl, line 2: it is not a JSON object on one line"),
        ("a.jsonl", "[" * 5000, "a.jsonl, line 1: it is not a JSON object"),
        ("a.jsonl", '"A cat"\n', "a.jsonl, line 1: it is not a JSON object"),
        ("a.jsonl", '{"prompt": "A", "prompt": "B"}', "a key appears twice"),
        ("a.jsonl", '{"prompt": ["A cat"]}', "line 1: prompt must be text"),
        ("a.jsonl", '{"id": "1"}', "line 1: the prompt is empty"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "line 1: prompt has half a surrogate pair"),
        ("a.jsonl", '{"prompt": "A cat", "id": "../cat"}', "line 1: the id becomes a file name"),
        ("a.jsonl", '{"prompt": "A cat", "seed": true}', "line 1: seed must be a whole number"),
        (
            "a.jsonl",
            '{"prompt": "A cat", "num_output_frames": 4}',
            "line 1: num_output_frames must be positive and a mul",
        ),
    ],
)
def test_refused(parse, name, content, complaint):
    with pytest.raises(InputError) as error:
        parse(name, content)
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--prompt", "A cat"], "--prompt_file and --prompt .*: leave one out"),
        (["--endless"], "--prompt_file and --endless"),
        (["--enable_webrtc"], "--prompt_file and --enable_webrtc"),
        (["--extended_prompt_file", "two.txt"], "two.txt has 2 lines and a.txt 1"),
        (["--data_parallel", "none"], "must be a number from 1"),
    ],
)
def test_flags_that_do_not_go_together(parse, tmp_path, flags, complaint):
    (tmp_path / "two.txt").write_text("A\nB\n")
    with pytest.raises(InputError, match=complaint):
        parse("a.txt", "A cat\n", *flags)


def test_flags_that_need_a_prompt_file():
    for flags in (["--overwrite"], ["--extended_prompt_file", sys.executable]):
        with pytest.raises(InputError, match="goes with --prompt_file"):
            parse_arguments("self_forcing", flags)


def test_causvid_has_no_images(parse):
    with pytest.raises(InputError, match="there is no column 'image'"):
        parse("a.jsonl", '{"prompt": "A cat", "image": "a.png"}', model="causvid")


def test_script_refuses_in_one_line(self_forcing_env, tmp_path):
    (tmp_path / "list.txt").write_text("A cat\n\nA dog\n")
    result = run("self_forcing_quantized.sh", self_forcing_env | {"PROMPT_FILE": "list.txt"}, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: list.txt, line 2: it is empty: remove it, or write a prompt\n"
    assert not (tmp_path / "my videos").exists()
