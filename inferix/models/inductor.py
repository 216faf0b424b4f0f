"""What ``torch.compile`` makes of the transformer on a GPU."""

import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import compile_fx
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

LONGEST_ROW = 16384


class WholeRows(InductorChoices):
    """Lets one thread block hold a row of up to ``LONGEST_ROW`` values in its registers.

    From 1024 values on, Inductor reads a row once for its mean or maximum and again to use it. A row of this network's
    hidden state, 1536 values, and of its feed-forward, 8960, fits: a norm or an activation and the quantization after
    it become one kernel that reads its input once.
    """

    @staticmethod
    def should_use_persistent_reduction(features, cooperative_reduction: bool) -> bool:
        if features.get_reduction_hint() != ReductionHint.OUTER and not cooperative_reduction:
            return V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW)
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


def whole_rows(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
    """The backend of ``torch.compile``: Inductor with ``WholeRows``, and with buffers as wide as what they hold.

    Padded, as Inductor would have them, the maxima of a frame's 1560 rows lie 1568 apart, and what uses them no longer
    fuses with what finds them.
    """
    with V.set_choices_handler(WholeRows()):
        return compile_fx(graph, inputs, config_patches={"comprehensive_padding": False})
