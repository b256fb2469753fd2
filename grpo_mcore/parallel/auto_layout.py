"""Fits roles and layouts to the number of processes: what `layout=auto` means."""

from collections.abc import Callable, Iterator

from grpo_mcore.parallel.grid import Layout

Accepts = Callable[[Layout], bool]
"""Whether a role can use a layout."""


def layouts_of_size(size: int) -> Iterator[Layout]:
    """All layouts of `size` ranks, the least split model first, tensor before pipeline."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    found = [
        Layout(tensor, pipeline, size // (tensor * pipeline))
        for tensor in divisors
        for pipeline in divisors
        if size % (tensor * pipeline) == 0
    ]
    return iter(sorted(found, key=lambda layout: (layout.model_ranks, layout.pipeline)))


def fit_role(size: int, accepts: Accepts) -> Layout | None:
    """The acceptable layout that splits the model least; None where there is none."""
    return next(filter(accepts, layouts_of_size(size)), None)


def fit_roles(
    world_size: int, placement: str, teacher: Accepts, student: Accepts
) -> tuple[str, Layout, Layout] | None:
    """Placement and layouts for `world_size` ranks.

    With separate ranks the teacher's model is split as little as can be; else the student takes
    about a quarter of the ranks: it only generates, while the teacher generates and trains. A
    single process carries both roles.
    """
    if placement == "auto":
        placement = "colocated" if world_size == 1 else "separate"
    if placement == "colocated":
        pair = fit_role(world_size, teacher), fit_role(world_size, student)
        return (placement, *pair) if all(pair) else None
    wanted = max(1, world_size // 4)
    fits = []
    for students in range(1, world_size):
        pair = fit_role(world_size - students, teacher), fit_role(students, student)
        if all(pair):
            fits.append((pair[0].model_ranks, abs(students - wanted), students, pair))
    return (placement, *min(fits)[-1]) if fits else None
