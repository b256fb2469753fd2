"""Python imports this first in programs that tests start (`clean_environment`): the engines of
these are forked from a process that has imported vLLM, and all else is as users have it."""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec


class _Engines(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "grpo_mcore.rollout.engine":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module

        def load_and_replace(module) -> None:
            load(module)
            from tests.forked import start_guarded

            module.start_guarded = start_guarded

        spec.loader.exec_module = load_and_replace
        return spec


sys.meta_path.insert(0, _Engines())
