"""A teacher's run, of whose student's engines some die.

    torchrun ... kills_worker.py PHASES AFTER REWARDS [OVERRIDES ...]

PHASES, such as "generate,start", and AFTER are those of `tests.rollout.kills.killing`; before the
former may stand which engine it is, as in "student-1:generate". REWARDS is "text", or "likelihood"
for the likelihood gain as well.
"""

import sys

from grpo_mcore.config.compose import compose_config
from grpo_mcore.launch import one_line_errors
from grpo_mcore.rewards import LikelihoodGainReward
from grpo_mcore.trainers import TeacherGRPOTrainer
from tests.end_to_end.conftest import ROOT
from tests.end_to_end.test_kills import reward_of_text
from tests.rollout.kills import killing


def main() -> None:
    phases, after, rewards, *overrides = sys.argv[1:]
    config = compose_config(ROOT / "examples/configs", "demo", overrides)
    more = [LikelihoodGainReward()] if rewards == "likelihood" else []
    of, _, phases = phases.rpartition(":")
    plan = phases.split(",") if phases else []
    with one_line_errors(), killing(*plan, of=of or "student", after=int(after)):
        TeacherGRPOTrainer(config, [reward_of_text, *more]).train()


if __name__ == "__main__":
    main()
