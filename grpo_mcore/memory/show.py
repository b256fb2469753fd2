"""A plan as a table and as JSON."""

from dataclasses import dataclass

from grpo_mcore.config import LayoutConfig
from grpo_mcore.memory.advice import Setting, excess
from grpo_mcore.memory.devices import GIB
from grpo_mcore.memory.job import PHASES, Job
from grpo_mcore.memory.training import total


@dataclass(frozen=True)
class Plan:
    """What `grpo-mcore plan` has found.

    Attributes:
        micro_batch: the largest `per_device_train_batch_size` that fits, if one does.
        remedies: settings that make the job fit or, where nothing does, help most.
        remedied: the job that they make.
    """

    job: Job
    micro_batch: int | None
    remedies: list[Setting]
    remedied: Job

    @property
    def fits(self) -> bool:
        return excess(self.job) == 0

    def as_json(self) -> dict:
        """Everything in it, in bytes."""
        job = self.job
        return {
            "device": {"name": job.device.name, "memory": job.device.memory},
            "placement": job.placement,
            "layouts": {role: str(layout) for role, layout in job.layouts.items()},
            "engines": job.engines,
            "lengths": job.lengths,
            "places": [
                {
                    "name": place.name,
                    "count": place.count,
                    "phases": place.phases,
                    "peak": dict(zip(("phase", "bytes"), place.peak, strict=True)),
                }
                for place in job.places()
            ],
            "fits": self.fits if job.device.memory else None,
            "largest_micro_batch": self.micro_batch,
            "remedies": {key: _value(value) for key, value in self.remedies},
            "fits_then": excess(self.remedied) == 0 if self.remedies else None,
        }

    def as_text(self) -> str:
        """A table of GiB for each device, or on a CPU for each process."""
        return "\n".join([self._header(), *self._tables(), *self._notes()])

    def _header(self) -> str:
        job = self.job
        roles = ", ".join(
            f"{role} {layout} (TPxPPxDP) with {job.engines[role]} "
            f"engine{'s' if job.engines[role] > 1 else ''}"
            for role, layout in job.layouts.items()
        )
        memory = f" of {job.device.memory / GIB:.0f} GiB" if job.device.memory else ""
        return f"estimate for {job.device.name}{memory}, {job.placement}: {roles}"

    def _tables(self) -> list[str]:
        lines = []
        for place in self.job.places():
            phases = [phase for phase in PHASES if phase in place.phases]
            title = f"GiB of each {place.name} ({place.count})"
            lines += ["", f"{title:36s}" + "".join(f"{phase:>11s}" for phase in phases)]
            for name in dict.fromkeys(n for phase in phases for n in place.phases[phase]):
                sizes = [place.phases[phase].get(name, 0) for phase in phases]
                if any(sizes):
                    lines.append(f"  {name:34s}" + "".join(map(_cell, sizes)))
            sums = [total(place.phases[phase]) for phase in phases]
            lines.append(f"  {'sum':34s}" + "".join(map(_cell, sums)))
            if place.memory:
                over = [
                    _cell(size - place.memory) if size > place.memory else f"{'-':>11s}"
                    for size in sums
                ]
                lines.append(f"  {'too much':34s}" + "".join(over))
        return lines

    def _notes(self) -> list[str]:
        job, notes = self.job, [""]
        notes += [
            f"an engine of the {role} has room for {job.sequences_cached(role):.1f} sequences "
            f"of {job.lengths[role]} tokens at once"
            for role in job.own_engines
        ]
        if job.device.memory is None:
            return [*notes, "processes share the host's memory, which is not compared"]
        if self.micro_batch is not None:
            notes.append(f"largest that fits: per_device_train_batch_size={self.micro_batch}")
        if self.fits:
            return [*notes, "fits"]
        said = " ".join(f"{key}={_value(value)}" for key, value in self.remedies)
        if not self.remedies:
            return [*notes, "does not fit, and no setting known here helps: more devices would"]
        share = max(p.peak[1] / p.memory for p in self.remedied.places() if p.memory)
        if excess(self.remedied) == 0:
            return [*notes, f"does not fit; with {said} it does, in {share:.0%} of the memory"]
        return [*notes, f"does not fit; {said} helps most, but more devices are needed"]


def _cell(size: int) -> str:
    return f"{size / GIB:11.2f}" if size else f"{'-':>11s}"


def _value(value: object) -> str:
    if isinstance(value, LayoutConfig):
        return "auto"
    return str(value).lower() if isinstance(value, bool) else str(value)
