"""What all trainers are to their users: TRL's and NeMo RL's methods around one session."""

import atexit
import math
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from grpo_mcore.callbacks import CallbackRunner
from grpo_mcore.callbacks.runner import AnyCallback
from grpo_mcore.checkpoint.resume import AUTO, find_checkpoint
from grpo_mcore.checkpoint.start import Start, choose_start
from grpo_mcore.config import ConfigError, TrainingConfig, trained_model
from grpo_mcore.config.nemo import from_arguments
from grpo_mcore.models.sources import push_folder
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import World, is_rank_zero, join, world_size
from grpo_mcore.report.result import TrainingResult, TrainOutput, training_result
from grpo_mcore.report.trackers import tracker_callbacks
from grpo_mcore.steps.session import Attendance, Session
from grpo_mcore.trainers.arguments import split_arguments
from grpo_mcore.weights.saving import write_policy


class BaseTrainer(ABC):
    """The methods of all trainers. The same script runs on every rank and calls them on every rank.

    The first method that needs the models joins the processes and loads them; they stay until
    `close`, the end of the script, an error, or another trainer's first such method.

    Attributes:
        args: the configuration; once the data are known, with batch sizes and steps as numbers.
        runner: callbacks, and transformers' `state` and `control`.
    """

    algorithm: ClassVar[str]
    """Whose settings of NeMo RL's it has (`config.nemo`)."""
    config_class: ClassVar[type[TrainingConfig]]
    _open: ClassVar["BaseTrainer | None"] = None
    """The one whose session is open in this process."""

    def __init__(
        self,
        args: TrainingConfig,
        callbacks: list[AnyCallback] | None = None,
        processing_class: Any = None,
    ):
        """
        Args:
            processing_class: a transformers tokenizer in place of the model's own.
        """
        self.args, self.processing_class = args, processing_class
        self._asked = args
        self._loaded: str | None = None
        """The checkpoint that `fit` goes on from."""
        self._is_ready = False
        self.runner = CallbackRunner(
            [*(callbacks or ()), *tracker_callbacks(args.report_to)], self, args
        )
        self._session: Session | Attendance | None = None
        self._cleanup = ExitStack()
        self._depth = 0
        """Methods under way that need the session, one inside the other."""

    @classmethod
    def from_pretrained(cls, model_name_or_path: Any, **settings) -> Self:
        """A trainer with NeMo RL's names and defaults; `fit` brings what is not given here.

        Args:
            settings: NeMo RL's tensor_parallel_size (1), learning_rate (1e-6; SFT 2e-5),
                max_sequence_length (512); of GRPO num_prompts_per_step (32),
                num_generations_per_prompt (16), normalize_rewards (True) and
                use_leave_one_out_baseline (True); of SFT and DPO batch_size (32); of DPO beta
                (0.1); any other of the configuration's; and arguments of the constructor.

        Raises:
            ConfigError: for an unknown one, or one that cannot work.
        """
        settings, others = split_arguments(cls, cls.config_class, cls.algorithm, settings)
        settings["model_name_or_path"] = model_name_or_path
        ours = from_arguments(settings, world_size(), cls.algorithm)
        return cls(ours.pop("model"), args=cls.config_class(**ours), **others)

    # What makes a trainer.

    @abstractmethod
    def _prepare(self) -> None:
        """Checks everything that can be checked before models load, and completes `args`.

        Raises:
            ConfigError: for a setting that cannot work.
        """

    @abstractmethod
    def _set_data(self, dataset: Any, **others) -> None:
        """Takes what `fit` was given."""

    @abstractmethod
    def _world(self) -> tuple[dict[str, Layout], str, float]:
        """Layouts of the roles, placement and deadline (`parallel.world.join`)."""

    @abstractmethod
    def _open_session(self, world: World, cleanup: ExitStack) -> Session | Attendance:
        """Loads models and starts engines."""

    @abstractmethod
    def _open_evals(self, datasets: Any) -> dict:
        """Evaluation data from what `evaluate` was given."""

    # TRL's and transformers' face.

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Runs the job to its end and writes the model to output_dir/final.

        Args:
            resume_from_checkpoint: a checkpoint or a folder of them; True: the newest in
                output_dir.
            trial, ignore_keys_for_eval: transformers'; without a meaning here.

        Returns:
            TrainOutput(global_step, training_loss, metrics); of a process that only carries a
            student, without any.

        Raises:
            ConfigError: when it cannot begin.
        """
        self._loaded = None
        if resume_from_checkpoint:
            self._begin_at(AUTO if resume_from_checkpoint is True else str(resume_from_checkpoint))
            if resume_from_checkpoint is True and not self._has_checkpoints():
                raise ConfigError(
                    f"resume_from_checkpoint=True: there is no checkpoint in {self.args.output_dir}"
                )
        with self._opened() as session:
            if isinstance(session, Attendance):
                session.serve()
                return TrainOutput(0, math.nan, {})
            output = session.loop.run(session)
            final = Path(self.args.output_dir) / "final"
            self._write_model(session, final)
            session.loop.say(f"trained model: {final}")
            session.run_ended()
            self.runner.train_end(training_result(output, self.runner.state))
            session.rest()
        if self.args.push_to_hub:
            self.push_to_hub()
        return output

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics on `eval_dataset`, or on the trainer's own.

        Raises:
            ConfigError: when there is neither.
        """
        with self._together() as session:
            if session is None:
                return {}
            datasets = None if eval_dataset is None else self._open_evals(eval_dataset)
            if datasets is None and not session.evaluates:
                raise ConfigError("eval_dataset=None: there is nothing to evaluate on; pass one")
            return session.loop.evaluate(lambda: session.evaluate(datasets), metric_key_prefix)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model, or with `peft_config` its adapters, with the tokenizer, as
        `from_pretrained` reads it, into `output_dir` (None: args.output_dir). Other files there
        stay."""
        with self._working() as session:
            if session:
                self._write_model(session, Path(output_dir or self.args.output_dir))

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ):
        """Uploads the model to `args.hub_model_id`.

        Returns:
            On rank 0 huggingface_hub's CommitInfo, or a Future of it without `blocking`.

        Raises:
            ConfigError: when no `hub_model_id` is set.
        """
        if not self.args.hub_model_id:
            raise ConfigError("hub_model_id=None: set it to push a model to the hub")
        with self._working() as session:
            if session is None:
                return None
            output = Path(self.args.output_dir)
            output.mkdir(parents=True, exist_ok=True)
            role = session.policy.role
            folder = role.once(lambda: tempfile.mkdtemp(prefix=".hub-", dir=output))
            self._write_model(session, Path(folder))
        if not is_rank_zero():
            return None
        upload = push_folder(
            Path(folder),
            self.args.hub_model_id,
            commit_message,
            token,
            revision,
            self.args.hub_private_repo,
            blocking=False,
        )
        upload.add_done_callback(lambda _: shutil.rmtree(folder))
        return upload.result() if blocking else upload

    def log(self, metrics: dict) -> None:
        """Records metrics of the user's own: in metrics.jsonl, callbacks and trackers."""
        if isinstance(self._session, Session):
            self._session.loop.log(metrics)
        else:
            self.runner.log(metrics)

    @property
    def state(self):
        """transformers' TrainerState."""
        return self.runner.state

    @property
    def current_rewards(self) -> Tensor | None:
        """[samples] of the newest step, for hooks; None where there are none."""
        return self.runner.current_rewards

    @property
    def current_kl(self) -> Tensor | None:
        """[1], the newest step's KL divergence, for hooks; None where there is none."""
        return self.runner.current_kl

    @property
    def control(self):
        """transformers' TrainerControl."""
        return self.runner.control

    def add_callback(self, callback: AnyCallback) -> None:
        """As in transformers."""
        self.runner.add_callback(callback)

    def pop_callback(self, callback: AnyCallback):
        """As in transformers."""
        return self.runner.pop_callback(callback)

    def remove_callback(self, callback: AnyCallback) -> None:
        """As in transformers."""
        self.runner.remove_callback(callback)

    # NeMo RL's face.

    def fit(
        self,
        dataset: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        callbacks: list[AnyCallback] | None = None,
        **others,
    ) -> TrainingResult:
        """Trains on `dataset` (None: on the trainer's own) and tells how it went.

        Args:
            dataset: a path, a name at the hub, rows, or a data module.
            max_steps, max_epochs: in place of the configuration's.
        """
        self.close()
        if max_steps is not None:
            self._asked = replace(self._asked, max_steps=max_steps)
        elif max_epochs is not None:
            self._asked = replace(self._asked, max_steps=-1, num_train_epochs=max_epochs)
        self.args = replace(self._asked, resume=self._loaded or self._asked.resume)
        for callback in callbacks or ():
            self.add_callback(callback)
        self._set_data(dataset, **others)
        self._get_ready()
        return training_result(self.train(), self.runner.state)

    def save_checkpoint(self, path: str) -> None:
        """Saves all that the run needs to go on into folder `path`/iter_..."""
        with self._working() as session:
            if session:
                session.loop.saves.save_to(Path(path), session.loop.done, session)

    def load_checkpoint(self, path: str) -> None:
        """Goes to the step of a checkpoint, or of the newest in a folder of them; `fit` does, where
        it brings the data.

        Raises:
            ConfigError: when there is none, or it does not fit the settings.
        """
        self._loaded = str(path)
        self._begin_at(self._loaded)
        if not self._is_ready:
            find_checkpoint(self._loaded, Path(self.args.output_dir) / "checkpoints")
            return
        with self._working():
            pass

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as a dictionary."""
        return asdict(self.args)

    @property
    def current_step(self) -> int:
        """Optimizer steps made."""
        return self.runner.state.global_step

    def close(self) -> None:
        """Frees models and engines, and leaves the other processes. A later method opens anew."""
        session, self._session = self._session, None
        if BaseTrainer._open is self:
            BaseTrainer._open = None
        if isinstance(session, Session):
            session.loop.close()
        self._cleanup.close()

    # For trainers.

    def _get_ready(self) -> None:
        """Once the data are known."""
        self._prepare()
        self._is_ready = True

    def _choose_start(self, world: World, role: str) -> Start:
        return choose_start(self.args, world.roles[role])

    @contextmanager
    def _opened(self) -> Iterator[Session | Attendance]:
        """The session, opened if it is not. It is closed on an error, but for one that the user can
        mend and all ranks find."""
        self._depth += 1
        try:
            if self._session is None:
                if not self._is_ready:
                    self._get_ready()
                if BaseTrainer._open is not None:
                    BaseTrainer._open.close()
                BaseTrainer._open = self
                self.runner.config = self.args
                world = self._cleanup.enter_context(join(*self._world()))
                self._session = self._open_session(world, self._cleanup)
                # Opened again, it must not go back there, where it has been trained since.
                self.args = replace(self.args, resume=self._asked.resume)
            yield self._session
        except BaseException as error:
            if self._session is None or not isinstance(error, ConfigError):
                self.close()
            raise
        finally:
            self._depth -= 1

    @contextmanager
    def _working(self) -> Iterator[Session | None]:
        """The session on the ranks that train, None on others, for what needs no other role."""
        with self._opened() as session:
            yield session if isinstance(session, Session) else None

    @contextmanager
    def _together(self) -> Iterator[Session | None]:
        """The session on the ranks that train; None on others, once they have worked for those."""
        with self._opened() as session:
            if isinstance(session, Attendance):
                session.serve()
                yield None
                return
            try:
                yield session
            except ConfigError:
                self._rest(session)
                raise
            self._rest(session)

    def _rest(self, session: Session) -> None:
        if self._depth == 1:  # not where a callback, amid training, has asked for this
            session.rest()

    def _begin_at(self, resume: str) -> None:
        self.close()
        self.args = replace(self.args, resume=resume)

    def _has_checkpoints(self) -> bool:
        return any((Path(self.args.output_dir) / "checkpoints").glob("iter_*"))

    def _write_model(self, session: Session, directory: Path) -> None:
        write_policy(
            session.policy, directory, trained_model(self.args).path, self.processing_class
        )


@atexit.register
def _close() -> None:
    if BaseTrainer._open is not None:
        BaseTrainer._open.close()
