"""Whether an infilled middle joins its ends: the toy's bidirectional teacher on held-out prompts.

    python -m bench.studies.infill_join runs/toy/teacher/model/teacher.safetensors [--world varied] [--steps 4 24]

The first and the last block of a clip of four are inputs, the two between them are generated. Breaks of the path at
both seams in pixels: of the true clip, the infilled one, and the same ends around a middle generated without them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from bench.lib import report
from hiar_model import FlowSchedule, load_transformer, load_video_model
from hiar_model.evaluation.join import measure_join
from hiar_model.toy.prompt import split_prompts
from hiar_model.toy.world import WORLDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="of a bidirectional toy transformer")
    parser.add_argument("--world", default="varied", choices=sorted(WORLDS))
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--prompts", type=int, default=64)
    a = parser.parse_args()
    torch.set_num_threads(1)
    toy = load_video_model("toy", "cpu")
    teacher = load_transformer(a.weights, toy.transformer.config, dtype=torch.float32).requires_grad_(False)
    prompts = split_prompts()[1][: a.prompts]
    cells = []
    for steps in a.steps:
        schedule = FlowSchedule.uniform(steps, toy.schedule.shift)
        model = replace(toy, transformer=teacher, schedule=schedule, world=WORLDS[a.world])
        j = measure_join(model, prompts)
        shares = [f"{100 * share:.1f}" for share in (j.seen, j.colour, j.shape)]
        cells.append([str(steps), *(f"{x:.2f}" for x in (j.true_break, j.infilled_break, j.apart_break)), *shares])
    headings = ("steps", "break, true", "infilled", "apart", "seen %", "colour %", "shape %")
    print("\n".join(report.table(headings, cells, text_columns=0)))


if __name__ == "__main__":
    main()
