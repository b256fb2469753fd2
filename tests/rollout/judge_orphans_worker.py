"""A process whose judge has two workers, to be ended in every way there is.

python judge_orphans_worker.py MODEL OUTPUT success|error|kill
"""

import signal
import sys
import time
from contextlib import closing
from pathlib import Path

from grpo_mcore import RewardSystemConfig, RIMReward
from grpo_mcore.config import JudgeServerConfig, RolloutConfig
from grpo_mcore.rewards.rim import Endpoint
from grpo_mcore.rollout.judge_server import JudgeServer


def main() -> None:
    # Jobs that a shell starts in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model, output, end = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    judge = JudgeServerConfig(model, tensor_parallel=2)
    rollout = RolloutConfig(kv_cache_gib=0.05, start_seconds=300, max_engine_restarts=0)
    with closing(JudgeServer(judge, rollout, "127.0.0.1", output / "judge.log")) as server:
        server.wait_until_ready(lambda: None)
        reward = RIMReward(config=RewardSystemConfig(timeout=120.0))
        reward.own_judge = Endpoint(server.base_url, None, server.api_key)
        found = reward.evaluate("2 + 2?", "count")
        (output / "failures").write_text(str(found.extra["failures"]))
        if end == "error":
            raise LookupError("no reward today")
        while end == "kill":
            time.sleep(1)


if __name__ == "__main__":
    main()
