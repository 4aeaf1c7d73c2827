"""TextWorld's own engine on a game file, in a process of its own: its planner library is global and may crash.

`python tests/alfworld_twin.py GAME < commands.json` prints what each step showed, offered and decided, the start first.
"""

import json
import sys

from alfworld.agents.utils.misc import Demangler
from textworld import EnvInfos
from textworld.core import Wrapper
from textworld.envs.pddl import PddlEnv


class Named(Wrapper):
    """Names as ALFWorld's own wrapper gives them."""

    def load(self, filename: str) -> None:
        super().load(filename)
        demangler = Demangler(game_infos=self._entity_infos)
        for info in self._entity_infos.values():
            info.name = demangler.demangle_alfred_name(info.id)


def main() -> None:
    path, commands = sys.argv[1], json.load(sys.stdin)
    environment = Named(PddlEnv(EnvInfos(won=True, admissible_commands=True)))
    environment.load(path)
    state = environment.reset()
    seen = [(state.feedback, state["admissible_commands"], bool(state["won"]))]
    for command in commands:
        state, _, _ = environment.step(command)
        seen.append((state.feedback, state["admissible_commands"], bool(state["won"])))
    print("\n" + json.dumps(seen))


main()
