"""What tests of the real vLLM share: where it is, a tiny model that its CPU kernels run, and what it is made to show.

vLLM pins a transformers of its own, so it lives in a venv of its own: this file, run as a script by that venv's Python,
writes what it finds as JSON, and the tests judge it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHAPE: dict[str, object] = {  # vLLM's attention on CPU wants heads of 32 numbers or more
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # else a helper of vLLM's is compiled for ten seconds
}


def find_python() -> tuple[str | None, str]:
    """The interpreter that has vLLM, and why there is none."""
    named = os.environ.get("LIT_AGENTRL_VLLM_PYTHON")
    python = Path(named) if named else ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        return None, f"vLLM lives in a venv of its own, and there is no {python}: `make .venv-vllm/.installed`"
    probe = "from importlib.util import find_spec; import sys; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    if subprocess.run([str(python), "-c", probe, "vllm", "peft", "lightning"], check=False).returncode:
        return None, f"{python} does not have vllm, peft and lightning: `make .venv-vllm/.installed`"
    return str(python), ""


def run_case(python: str, case: str, *arguments: str, seconds: float = 400) -> dict[str, Any]:
    """What a case of this file finds in a process of its own."""
    with tempfile.NamedTemporaryFile("r") as file, own_folder() as own:  # vLLM writes to both streams
        done = subprocess.run(
            [python, __file__, case, file.name, *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=os.environ | ENVIRONMENT | own,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        found: dict[str, Any] = json.load(file)
    return found


@contextmanager
def own_folder() -> Iterator[dict[str, str]]:
    """A variable that has vLLM leave its sockets and files in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True) as folder:
        yield {"TMPDIR": folder}


@contextmanager
def served(python: str, folder: str, log: Path, *options: str) -> Iterator[str]:
    """The address of a real server, started as users start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lit_agentrl", "serve-vllm", folder, "--python", python]
    command += ["--port", str(port), "--dtype", "float32", *options, "--", "--max-num-seqs", "64"]
    url = f"http://127.0.0.1:{port}"
    with own_folder() as own, log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT | own, start_new_session=True
        )
        yield from _while_healthy(process, url, log)


def _while_healthy(process: "subprocess.Popen[bytes]", url: str, log: Path) -> Iterator[str]:
    try:
        end = time.monotonic() + 500
        while True:
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < end, log.read_text()[-6000:]
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def shown(completions: list[Any]) -> list[dict[str, Any]]:
    """Completions as JSON holds them."""
    names = ("token_ids", "logprobs", "finish", "num_cached", "num_prefilled")
    return [{name: getattr(completion, name) for name in names} for completion in completions]


def moments(lm: Any) -> list[float]:
    """The slow twin of a fingerprint: of every weight of a transformers model, tied ones once."""
    values = [parameter.detach().double() for parameter in lm.parameters()]
    return [
        sum(v.numel() for v in values),
        sum(float(v.sum()) for v in values),
        sum(float((v * v).sum()) for v in values),
    ]


def differences(lm: Any, contexts: list[list[int]], completions: list[Any], temperature: float) -> float:
    """The largest difference of log-probabilities from those of a plain forward."""
    import torch

    worst = 0.0
    for context, completion in zip(contexts, completions, strict=True):
        ids = torch.tensor([context + completion.token_ids])
        with torch.no_grad():
            logits = lm(input_ids=ids).logits[0, len(context) - 1 : -1].double()
        right = (logits / temperature).log_softmax(-1).gather(1, ids[0, len(context) :, None])[:, 0]
        worst = max(worst, float((right - torch.tensor(completion.logprobs).double()).abs().max()))
    return worst


def change(lm: Any, seed: int) -> None:
    """Other weights: of a model everywhere, of one under an adapter the adapter's alone."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


SHARED = list(range(10, 90))
CONTEXTS = [[*SHARED, 100], [*SHARED, 101, 102], [7, 8, 9], [*range(200, 250)]]


def full(folder: str) -> dict[str, Any]:
    """All of the engine that one start of vLLM can show."""
    from lit_agentrl.models.policy import load_policy, load_tokenizer
    from lit_agentrl.rollouts import HFEngine, VLLMEngine
    from lit_agentrl.rollouts.lm_limits import default_stop_ids
    from lit_agentrl.rollouts.vllm import EngineError
    from lit_agentrl.types import SamplingParams

    lm, tokenizer = load_policy(folder), load_tokenizer(folder)
    engine, twin = VLLMEngine(isolated=False), HFEngine()
    for each in (engine, twin):
        each.use_tokenizer(tokenizer)
        each.sync(lm)
    found: dict[str, Any] = {"dtype": str(engine.weights_dtype)}
    greedy, seeds = SamplingParams(temperature=0, max_new_tokens=16), [1, 2, 3, 4]

    def compare(params: SamplingParams) -> list[Any]:
        return [shown(each.generate(CONTEXTS, params, seeds)) for each in (engine, twin)]

    found["greedy"] = compare(greedy)
    found["again"] = shown(engine.generate(CONTEXTS, greedy, seeds))
    longest = found["greedy"][1][0]["token_ids"]
    found["stop_token"] = compare(SamplingParams(temperature=0, max_new_tokens=16, stop_token_ids=(longest[4],)))
    written = [token for completion in found["greedy"][1] for token in completion["token_ids"][1:]]
    whole = [
        piece
        for token in written
        if "\ufffd" not in (piece := tokenizer.decode([token], skip_special_tokens=True)) and piece
    ]
    found["stop_string"] = compare(SamplingParams(temperature=0, max_new_tokens=16, stop=(whole[0], "zq")))
    found["differences"] = {}
    for temperature in (0.5, 1.0, 1.7):
        params = SamplingParams(temperature=temperature, max_new_tokens=16)
        sampled = engine.generate(CONTEXTS, params, seeds)
        found["differences"][str(temperature)] = differences(lm, CONTEXTS, sampled, temperature)
    params = SamplingParams(max_new_tokens=16)
    found["sampled"] = [shown(engine.generate(CONTEXTS, params, s)) for s in (seeds, seeds, [5, 6, 7, 8])]
    found["alone"] = shown(engine.generate(CONTEXTS[1:2], params, seeds[1:2]))
    many = [[(7 * row + place) % 290 + 4 for place in range(400)] for row in range(40)]
    sampled = engine.generate(many, SamplingParams(max_new_tokens=4), range(40))
    found["many"] = [shown(sampled), differences(lm, many, sampled, 1.0), default_stop_ids(lm)]
    same = [CONTEXTS[2]] * 12
    free = engine.generate(same, SamplingParams(max_new_tokens=40), range(12))
    ended = engine.generate(same, SamplingParams(max_new_tokens=40, stop=(*"abcdefghijklm", "é", "th")), range(12))
    found["cut"] = [shown(free), shown(ended)]
    found["texts"] = [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in ended]
    found["fingerprint"] = [vars(engine.fingerprint()), moments(lm)]
    change(lm, 1)
    for each in (engine, twin):
        each.sync(lm)
    found["version"] = engine.version
    found["changed"] = compare(greedy)
    found["changed_fingerprint"] = [vars(engine.fingerprint()), moments(lm)]
    change(lm, 2)
    stale = engine.weights.write(lm, tokenizer, "full")
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(stale)})  # vLLM's own, without ours
    try:
        found["stock_reload"] = vars(engine.fingerprint())
    except EngineError as error:
        found["stock_reload"] = str(error)
    place = engine.weights._path
    engine.close()
    found["left"] = bool(place and place.exists())
    return found


def adapter(folder: str) -> dict[str, Any]:
    """The engine with an adapter that goes alone."""
    from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
    from lit_agentrl.rollouts import HFEngine, VLLMEngine
    from lit_agentrl.types import SamplingParams

    lm, tokenizer = load_policy(folder, lora=Lora(r=4)), load_tokenizer(folder)
    engine, twin = VLLMEngine(sync="adapter", isolated=False), HFEngine()
    found: dict[str, Any] = {"runs": []}
    for seed in range(3):
        if seed:
            import torch

            torch.manual_seed(seed)
            for name, parameter in lm.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.3)
        for each in (engine, twin):
            each.use_tokenizer(tokenizer)
            each.sync(lm)
        params = SamplingParams(temperature=0, max_new_tokens=12)
        found["runs"].append([shown(each.generate(CONTEXTS, params)) for each in (engine, twin)])
    found["fingerprint"] = engine.fingerprint()
    engine.close()
    return found


def workers(folder: str) -> dict[str, Any]:
    """One model over two workers, synced twice."""
    from lit_agentrl.models.policy import load_policy, load_tokenizer
    from lit_agentrl.rollouts import HFEngine, VLLMEngine
    from lit_agentrl.types import SamplingParams

    lm, tokenizer = load_policy(folder), load_tokenizer(folder)
    engine, twin = VLLMEngine(tensor_parallel=2, timeout=300), HFEngine()
    found: dict[str, Any] = {"runs": [], "fingerprints": []}
    for seed in range(2):
        change(lm, seed)
        for each in (engine, twin):
            each.use_tokenizer(tokenizer)
            each.sync(lm)
        params = SamplingParams(temperature=0, max_new_tokens=12)
        found["runs"].append([shown(each.generate(CONTEXTS, params)) for each in (engine, twin)])
        found["fingerprints"].append([vars(engine.fingerprint()), moments(lm)])
    found["states"] = engine._call_workers("lit_state")
    engine.close()
    return found


def hang(folder: str) -> dict[str, Any]:
    """vLLM in processes of its own: one that is stopped is given up, and the next sync starts another."""
    from lit_agentrl.models.policy import load_policy, load_tokenizer
    from lit_agentrl.rollouts import VLLMEngine
    from lit_agentrl.rollouts.vllm import EngineError
    from lit_agentrl.rollouts.vllm.start import _sockets
    from lit_agentrl.types import SamplingParams

    lm, tokenizer = load_policy(folder), load_tokenizer(folder)
    import torch

    torch.manual_seed(7)
    before = torch.rand(1)
    torch.manual_seed(7)
    engine = VLLMEngine(timeout=300)
    engine.use_tokenizer(tokenizer)
    engine.sync(lm)
    found: dict[str, Any] = {"keeps_seed": bool(torch.equal(torch.rand(1), before))}
    params = SamplingParams(max_new_tokens=8)
    found["first"] = shown(engine.generate(CONTEXTS, params, range(4)))
    places = (Path(tempfile.gettempdir()), Path(_sockets()))
    found["sockets"] = [sum(file.is_socket() for file in place.iterdir()) for place in places]
    cores = [int(line.split()[0]) for line in _processes() if "VLLM::" in line]
    for core in cores:
        os.kill(core, signal.SIGSTOP)
    engine.timeout = 3.0
    began = time.monotonic()
    try:
        engine.generate(CONTEXTS, params, range(4))
    except EngineError as error:
        found["error"] = str(error)
    found["seconds"] = time.monotonic() - began
    found["num_processes"] = len(cores)
    found["left"] = [line for line in _processes() if int(line.split()[0]) in cores and "defunct" not in line]
    for core in cores:  # whatever of it is left
        try:
            os.kill(core, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return found


def fit(folder: str, run: str) -> dict[str, Any]:
    """The command line with vLLM in processes beside it; what it leaves in memory afterwards."""
    import runs

    before = set(Path("/dev/shm").glob("lit-agentrl-*"))
    engine = '{"class_path": "VLLMEngine", "init_args": {"timeout": 300}}'
    runs.fit(folder, Path(run), "--data.engine", engine, "--model.old_logprobs", "recompute")
    return {"shm": [str(path) for path in set(Path("/dev/shm").glob("lit-agentrl-*")) - before]}


def _processes() -> list[str]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    lines = listed.splitlines()[1:]
    mine = {os.getpid()}
    for _ in range(3):  # children of children
        mine |= {int(line.split()[0]) for line in lines if int(line.split()[1]) in mine}
    return [line for line in lines if int(line.split()[0]) in mine]


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "full": full,
    "adapter": adapter,
    "workers": workers,
    "hang": hang,
    "fit": fit,
}

if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(CASES[sys.argv[1]](*sys.argv[3:])))
    os._exit(0)  # vLLM in this process may wait for its own threads
