"""The command line: Lightning's subcommands over the project's modules, and the project's own beside them."""

from __future__ import annotations

import importlib
import os
import sys

from lit_agentrl import __version__
from lit_agentrl.errors import UserError
from lit_agentrl.files import is_disk_full

OVERVIEW = f"""lit-agentrl {__version__}: train LLM and VLM agents with reinforcement learning.

usage: lit-agentrl COMMAND [options]

  fit        train: lit-agentrl fit --config configs/experiment/NAME.yaml [--model.X --data.X --trainer.X]
  evaluate   success on held-out tasks without training (add --ckpt_path or --model.pretrained)
  doctor     is sharing prefixes right and worth it, how noisy are ratios: on your model and rows, with fit's options
  mine-preferences    pairs of a better and a worse answer, for DPO: lit-agentrl mine-preferences --config FILE
  validate   the same through Lightning's validation loop
  test       the same through Lightning's test loop
  pipeline   a chain of stages: lit-agentrl pipeline configs/pipeline/quickstart.yaml
  compare    configurations at the same budget, with intervals: lit-agentrl compare --config configs/compare/NAME.yaml
  make-webshop-demo   a made-up catalogue to shop in: lit-agentrl make-webshop-demo OUTPUT [--num_products 200 --seed 0]
  make-alfworld-games games of ALFWorld's format: lit-agentrl make-alfworld-games OUTPUT [--num_train 60 --seed 0 ...]
  make-facts-qa       a corpus and questions to search it: lit-agentrl make-facts-qa OUTPUT [--num_train 1400 --seed 0]
  make-lesions        synthetic pictures of skin lesions as files: lit-agentrl make-lesions OUTPUT [--seed 0 ...]
  build-kg            a knowledge graph of skin diseases: lit-agentrl build-kg OUTPUT [--sources notes --text FILE]
  make-vlm            a small vision-language model from packaged parts: lit-agentrl make-vlm [OUTPUT --seed 0 ...]
  consolidate         a folder of shards as one file to resume from: lit-agentrl consolidate FOLDER OUTPUT.ckpt
  serve-retriever     a search server for agents: lit-agentrl serve-retriever --corpus FILE [--kind bm25 ...]
  serve-vllm          a vLLM server for rollouts: lit-agentrl serve-vllm MODEL [--port 8000 ...]

Every command has --help; `lit-agentrl fit --config FILE --print_config` shows all options with their values.
Set LIT_AGENTRL_DEBUG=1 to see the traceback of an error."""

LIGHTNING_COMMANDS = ("fit", "validate", "test", "evaluate", "doctor", "mine-preferences")
OWN_COMMANDS = {
    "pipeline": "lit_agentrl.pipeline",
    "compare": "lit_agentrl.compare",
    "consolidate": "lit_agentrl.checkpoints.consolidate",
    "serve-retriever": "lit_agentrl.retrieval.serve",
    "serve-vllm": "lit_agentrl.rollouts.vllm.serve",
    "make-facts-qa": "lit_agentrl.envs.search.facts.command",
    "make-lesions": "lit_agentrl.envs.dermatology.synthetic_command",
    "build-kg": "lit_agentrl.knowledge.build",
    "make-webshop-demo": "lit_agentrl.envs.webshop.demo",
    "make-vlm": "lit_agentrl.vlm.command",
    "make-alfworld-games": "lit_agentrl.envs.alfworld.maker",
}
"""The module whose `main(options)` runs each: imported when it is asked for."""


def main(args: list[str] | None = None) -> None:
    """Run `lit-agentrl` with these arguments (the process's own by default).

    Raises:
        SystemExit: With 2 after an error that is the user's to fix, 130 or 143 after Ctrl-C or SIGTERM (which is how
            `serve-retriever` is told to end: there it is no error).
    """
    given = sys.argv[1:] if args is None else args
    if not given or given[0] in ("-h", "--help"):
        print(OVERVIEW)
        return
    if given[0] == "--version":
        print(__version__)
        return
    try:
        _dispatch(given[0], given[1:])
    except Exception as error:
        text = _user_error(error)
        if text is None or os.environ.get("LIT_AGENTRL_DEBUG"):
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None


def _user_error(error: BaseException | None) -> str | None:
    """The text of the user's error behind an exception: option parsing wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException":
            return str(error)
        if isinstance(error, OSError) and is_disk_full(error):
            return f"{error}: make room for what this run writes, then go on with its last checkpoint."
        error = error.__cause__ or error.__context__
    return None


def _dispatch(command: str, options: list[str]) -> None:
    if command in OWN_COMMANDS:
        importlib.import_module(OWN_COMMANDS[command]).main(options)
    elif command in LIGHTNING_COMMANDS:
        from lit_agentrl.lightning_cli import run

        try:
            run([command, *options])
        except SystemExit as end:
            # Lightning exits with 1 after Ctrl-C; shells and schedulers know an interrupt by 130.
            raise SystemExit(130 if isinstance(end.__context__, KeyboardInterrupt) else end.code) from None
    else:
        commands = (*LIGHTNING_COMMANDS, *OWN_COMMANDS)
        raise UserError(f"there is no command {command!r}. Commands: {', '.join(commands)}.")
