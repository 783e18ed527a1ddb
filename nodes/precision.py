"""The sensitive parts of a quantised model, in full precision again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..kernels.precision import OUTERMOST, SENSITIVE
from ._host.api import io, say_on_node, schema
from ._host.precision import (
    NONE,
    Weight,
    embedding_error,
    file_of,
    files,
    is_dynamic,
    not_dynamic,
    read_full,
    rounding_error,
    weights_of,
    with_full,
    with_more_bits,
)
from ._plan.precision import PartFound, precision_report

LOG = logging.getLogger(__name__)
CATEGORY = "attune/precision"
SENSITIVE_ONLY, AND_OUTERMOST = "sensitive", "sensitive and outermost blocks"


class AttunePrecisionGuard(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttunePrecisionGuard", "Attune Precision Guard", CATEGORY,
            "Says which sensitive weights of an fp8 model are rounded, and replaces them with the unrounded ones of "
            "the full model's file.",
            search_aliases=["fp8", "quantization", "float8", "precision", "TFMQ", "time embedding"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model whose weights are looked at. LoRAs stay on it."),
                io.Combo.Input(
                    "full_precision", options=[NONE, *files()], default=NONE,
                    tooltip="The file that the smaller model was made from, in half or full precision; only the few "
                    "sensitive weights are read. none: only say what was found.",
                ),
                io.Combo.Input(
                    "parts", options=[SENSITIVE_ONLY, AND_OUTERMOST], default=SENSITIVE_ONLY,
                    tooltip="sensitive: the time embedding and its projections, first and last layers, norms and "
                    "biases. sensitive and outermost blocks: the first and the last block, too. That is nearer to "
                    "the full model and takes more memory.",
                ),
                io.Int.Input(
                    "more_bits", default=0, min=0, max=4,
                    tooltip="How many bits of all other rounded weights are put back from the full file, which is then "
                    "read whole. Each brings these weights about 6 dB nearer to the full ones and takes an eighth of a "
                    "byte per weight; every step takes longer. 0: they stay as they are.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For any sampler. If nothing is rounded, it is the model that came in.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How each part is kept, what that costs, and what the node did.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, full_precision=NONE):
        return True  # of a file that went away the node says what to do

    @classmethod
    def execute(cls, model, full_precision=NONE, parts=SENSITIVE_ONLY, more_bits=0) -> io.NodeOutput:
        if full_precision != NONE:
            file_of(full_precision)
        wanted = SENSITIVE if parts == SENSITIVE_ONLY else (*SENSITIVE, OUTERMOST)
        every = weights_of(model)
        weights = [one for one in every if one.part in wanted]
        others = [one for one in every if one.part not in wanted] if more_bits and full_precision != NONE else []
        low = [one for one in weights if one.low]
        if full_precision != NONE and is_dynamic(model) and any(one.low for one in (*low, *others)):
            return cls.execute(not_dynamic(model), full_precision, parts, more_bits)
        full = read_full(full_precision, low) if low and full_precision != NONE else {}
        out = with_full(model, low, full) if full else model
        finer = [one for one in others if one.takes_bits]
        out, more = with_more_bits(out, finer, full_precision, more_bits) if finer else (out, None)
        report = precision_report(
            parts_found(weights, full),
            embedding_error(model, weights, full) if full else None,
            len(full),
            sum(one.numel() * one.element_size() for one in full.values()) / 1e6,
            "" if full_precision == NONE else full_precision,
            sorted({one.kept for one in weights if one.read_only}),
            more,
            sum(one.low and one.in_8_bits for one in others),
        )
        LOG.info("Attune Precision Guard: %s", report.replace("\n", " "))
        say_on_node(cls, report)
        return io.NodeOutput(out, report)


def parts_found(weights: Sequence[Weight], full: Mapping[str, Tensor]) -> list[PartFound]:
    """What there is of each sensitive part, in a fixed order."""
    found = []
    for part in (*SENSITIVE, OUTERMOST):
        own = [one for one in weights if one.part == part]
        known = [one for one in own if one.name in full]
        if own:
            error = rounding_error(known, full) if known else None
            found.append(PartFound(part, Counter(one.kept for one in own), sum(one.low for one in own), error))
    return found


NODES = [AttunePrecisionGuard]
