"""The engines that sample from what is trained: they have its weights whenever they do."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import ModuleList

from grpo_mcore.config import GroupConfig
from grpo_mcore.report.phases import Phases
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.requests import Completion, Request
from grpo_mcore.steps.verdict import HandOver
from grpo_mcore.training.policy import Policy
from grpo_mcore.weights.sync import SyncError, WeightSync


class PolicyEngines:
    """Every method is called by all ranks of the policy's role.

    Attributes:
        synced_version: that the engines were proven to hold when last asked; those that sleep hold
            none.
        tensors_sent: by the newest sync.
        difference: what the sync that ended a step has found.
    """

    policy: Policy
    sync: WeightSync

    def __init__(self, pool: RolloutPool, config: GroupConfig, phases: Phases):
        """
        Args:
            pool: may still be starting, so that the policy can be built meanwhile.
        """
        self.pool, self.config, self.phases = pool, config, phases
        self.makes_room = config.rollout.offload_policy
        self.synced_version, self.tensors_sent = -1, 0
        self.difference: SyncError | None = None
        self.sent: dict[str, float] = {}
        """What a step's sync has moved, until the step's record has it."""
        self.sampled = "trainer"

    def follow(self, policy: Policy, reference: ModuleList | None = None) -> None:
        """Waits for the engines and gives them the weights of `policy`, now and from now on.

        Args:
            reference: shards of another model of the same shape, which they are given instead.
        """
        self.policy = policy
        self.pool.wait_until_ready()
        if reference is not None:
            self.sampled = "reference"
        rollout = self.config.rollout
        self.sync = WeightSync(
            policy.chunks if reference is None else reference,
            policy.shape,
            policy.role,
            self.pool,
            rollout.bucket_megabytes,
            self.config.peft_config if rollout.lora_sync == "adapters" else None,
        )
        self.pool.refill, self.pool.make_room = self._refill, policy.away
        self.update()

    def generate(self, requests: list[Request]) -> list[Completion]:
        """One completion a request, in order."""
        with self.awake():
            return self.pool.generate(requests)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Engines that hold the policy's weights, and sleep afterwards, as the trainer may need
        their device memory. If that is asked for, the policy makes room: gradients and optimizer
        go before the engines' weights wake, parameters when these are loaded."""
        try:
            if self.makes_room:
                self.policy.free_training_state()
                with self.phases("sync"):
                    self.sent |= self.update()
                self.policy.leave_device()
            else:
                self.update()
            yield
            self.pool.sleep()
        except EngineError:
            if self.makes_room:  # for the policy, which is saved
                self.pool.close()
                self.policy.role.all_gather(None)
            raise
        finally:  # what is saved when engines fail has to be there
            self.policy.return_to_device()

    def update(self) -> dict[str, float]:
        """Gives the engines the policy's weights, unless they have them.

        Raises:
            SyncError: when they were given others, now or by the step before.

        Returns:
            What has moved, as metrics.
        """
        if self.difference:
            raise self.difference
        sent = {}
        if self.pool.behind(self.policy.version):
            sent = self.sync.push(self.policy.version)
            self.tensors_sent = sent["tensors"]
        self.synced_version = self.pool.version
        return {f"sync/{name}": float(value) for name, value in sent.items()}

    def update_after_step(self) -> str | None:
        """The step is made, whatever becomes of the engines: who next needs them finds out. Returns
        a warning, if there is reason for one."""
        with self.phases("sync"):
            try:
                self.sent = self.update()
            except SyncError as error:
                self.difference = error
            except EngineError as error:
                return f"warning: {error}"
        return None

    def take_sent(self) -> dict[str, float]:
        """What this step's sync has moved, as metrics."""
        sent, self.sent = self.sent, {}
        return sent

    def hand_over(self) -> HandOver:
        """What samples now."""
        return HandOver(self.synced_version, self.policy.version, self.tensors_sent, self.sampled)

    def check_last_sync(self) -> None:
        """
        Raises:
            SyncError: when the last step's weights differ in the engines, which nobody needed.
        """
        if self.difference:
            raise self.difference

    def _refill(self) -> None:
        """Gives the policy's weights to engines that were restarted while others generate."""
        self.policy.return_parameters()
        self.sync.push(self.policy.version)
        if self.makes_room:
            self.policy.leave_device()
