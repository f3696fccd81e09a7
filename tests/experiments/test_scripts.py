"""The scripts as a person runs them: in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--preset", "tiny", "--recompute", "none", "--batch.sequence-length", "32", "--data.validation-share", "0.2"]
# A dense layer, one with experts and a prediction module: a layer of every kind.
SMALL = [*TINY, "--model.num-hidden-layers", "2"]


def _environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
                         "JAX_COMPILATION_CACHE_DIR": str(ROOT / "tests" / ".cache"), "PYTHONPATH": str(ROOT),
                         # Scripts compile the same small programs again and again.
                         "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


def _start(script: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "experiments" / script), *map(str, arguments)], text=True,
                            env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            cwd=ROOT)


def _run(script: str, *arguments: object, status: int = 0, stdin: str = "") -> tuple[str, str]:
    process = _start(script, *arguments)
    out, err = process.communicate(stdin, timeout=400)
    assert process.returncode == status, err[-3000:] + out[-3000:]
    return out, err


def _losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "loss" in r]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for part in range(10):
        (folder / f"{part}.txt").write_text("".join(f"{n} times {part} is {n * part}.\n" for n in range(300)))
    return folder


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> tuple[Path, dict]:
    """A finished run and the JSON it printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    out, err = _run("train.py", *SMALL, "--data.path", text, "--steps", 20, "--run-dir", run_dir, "--json")
    assert "step 20/20" in err
    return run_dir, json.loads(out)


def test_train_prints_one_json_value(finished):
    run_dir, summary = finished
    assert summary["finished"]
    assert summary["step"] == 20
    assert summary["validation_bits_per_byte"] > 0
    assert json.loads((run_dir / "config.json").read_text())["batch"]["sequence_length"] == 32


def test_generate_streams_text_that_repeats_with_its_seed(finished):
    run_dir, _ = finished
    asked = [run_dir, "--prompt", "12 times", "--tokens", 12, "--seed", 3]
    streamed, _ = _run("generate.py", *asked)
    made = json.loads(_run("generate.py", *asked, "--json")[0])
    assert streamed == "12 times" + made["text"] + "\n"


def test_generate_takes_several_prompts_and_drafts(finished, tmp_path):
    """Greedy text is the same with drafts as without, and ends before a stop sequence."""
    run_dir, _ = finished
    (tmp_path / "prompts.txt").write_text("3 times\n\n11 times 2\n")
    common = [run_dir, "--tokens", 10, "--temperature", 0, "--json"]
    plain, _ = _run("generate.py", *common, "--prompt", "12 times", "--prompts", tmp_path / "prompts.txt")
    text = json.loads(plain)["answers"][0]["text"]
    stop = next(character for character in reversed(text) if character.isascii() and character != text[0])
    drafted, _ = _run("generate.py", *common, "--prompt", "-", "--prompts", tmp_path / "prompts.txt", "--speculative",
                      "--stop", stop, stdin="12 times\n")
    plain, drafted = map(json.loads, (plain, drafted))
    for answers in (plain["answers"], drafted["answers"]):
        assert [answer["prompt"] for answer in answers] == ["12 times", "3 times", "11 times 2"]
    assert [answer["text"] for answer in drafted["answers"]] == [
        answer["text"].split(stop)[0] for answer in plain["answers"]]
    assert plain["acceptance"] is None
    assert 0 <= drafted["acceptance"] <= 1 <= drafted["tokens_per_step"] <= 2


def test_chat_answers_what_is_piped_in(finished, tmp_path):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    _, err = _run("chat.py", run_dir, status=2, stdin="hello\n")
    assert "has no chat template" in err
    assert "Traceback" not in err
    (run_dir / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}")
    options = [run_dir, "--tokens", 8, "--temperature", 0]
    one = json.loads(_run("chat.py", *options, "--json", stdin="12 times\n")[0])
    out, err = _run("chat.py", *options, stdin="12 times\n\n12 times\nand <|end_of_text|>\nand\n")
    answer = one["answer"] + "\n"
    assert out.startswith(2 * answer)  # the empty line began a new conversation
    assert len(out) > len(2 * answer)  # and one goes on after a message that was refused
    assert "spells the special token" in err


def test_serve_answers_the_public_client_until_it_is_stopped(finished, tmp_path):
    run_dir = finished[0]
    asked = [run_dir, "--tokens", 12, "--temperature", 0, "--prompt", "12 times", "--json"]
    made = json.loads(_run("generate.py", *asked)[0])
    process = _start("serve.py", run_dir, "--port", 0, "--name", "counts", "--api-key", "secret", "--engine.rows", 2,
                     "--engine.page-size", 8)
    try:
        ready = process.stdout.readline()
        assert ready.startswith("ready http://127.0.0.1:"), ready + process.communicate(timeout=60)[1][-3000:]
        client = openai.OpenAI(base_url=ready.split()[1], api_key="secret", max_retries=0, timeout=100)
        answer = client.completions.create(model="counts", prompt="12 times", max_tokens=12, temperature=0)
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(model="counts", messages=[{"role": "user", "content": "12 times"}])
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert answer.choices[0].text == made["text"]
    assert answer.usage.completion_tokens == made["tokens"]
    assert (process.returncode, out) == (0, "")
    assert "/v1/completions 200 cmpl-" in err
    assert err.endswith("stopped\n")
    assert "secret" not in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_serve_with_workers_in_processes_of_their_own(finished, monkeypatch):
    """The answer is generate.py's; a worker that is stopped is missed, another takes its place, all end with the
    server."""
    run_dir = finished[0]
    made = json.loads(_run("generate.py", run_dir, "--tokens", 12, "--temperature", 0, "--prompt", "12 times",
                           "--json")[0])
    assert "wants --engine.redundant" in _run("serve.py", run_dir, "--engine.rebalance-every-s", 1, status=2)[1]
    assert "SERVE_WORKER_KEY is not set" in _run("serve.py", run_dir, "--workers", "127.0.0.1:0", status=2)[1]
    monkeypatch.setenv("SERVE_WORKER_KEY", "secret")
    assert "must be HOST:PORT" in _run("serve_worker.py", "prefill", run_dir, "--router", "8100", status=2)[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        router = f"127.0.0.1:{free.getsockname()[1]}"
    engine = ["--engine.rows", 2, "--engine.page-size", 8]
    server = _start("serve.py", run_dir, "--port", 0, "--workers", router)
    time.sleep(5)  # workers do not wait for a server
    replicas = ["--mesh.simulate-devices", 2, "--mesh.scale-up", 2, "--engine.redundant", 2,
                "--engine.rebalance-every-s", 0.5]
    workers = {kind: _start("serve_worker.py", kind, run_dir, "--router", router, *engine, *more)
               for kind, more in (("prefill", []), ("decode", replicas))}
    try:
        ready = server.stdout.readline()
        assert ready.startswith("ready http://127.0.0.1:"), ready + server.communicate(timeout=60)[1][-3000:]
        client = openai.OpenAI(base_url=ready.split()[1], api_key="none", max_retries=0, timeout=100)

        def answer() -> str:
            return client.completions.create(model=run_dir.name, prompt="12 times", max_tokens=12,
                                             temperature=0).choices[0].text
        assert answer() == made["text"]
        with pytest.raises(openai.BadRequestError, match="outside model"):
            client.completions.create(model=run_dir.name, prompt=[10 ** 6], max_tokens=2)
        workers["decode"].send_signal(signal.SIGTERM)
        assert workers["decode"].wait(60) == 0
        workers["another"] = _start("serve_worker.py", "decode", run_dir, "--router", router, *engine)
        assert answer() == made["text"]
    finally:
        server.send_signal(signal.SIGTERM)
        told = {name: process.communicate(timeout=60) for name, process in {"server": server, **workers}.items()}
    assert [process.returncode for process in (server, *workers.values())] == [0] * 4, told
    assert "Traceback" not in "".join(err for _, err in told.values())


@pytest.mark.slow
def test_caches_are_compared_in_bytes_and_in_bits_per_byte(finished, tmp_path):
    """What is read through a float32 cache is what training evaluated, but for the order of float32 sums."""
    run_dir, summary = finished
    told = json.loads(_run("kv_cache.py", "--quality", run_dir, "--windows", 8, "--out", tmp_path / "kv", "--json")[0])
    sizes = {(row["name"], row["cache"]): row["bytes_per_token"] for row in told["sizes"]}
    assert sizes["DeepSeek-V3, MLA", "bf16"] == 70_272
    assert sizes["DeepSeek-V3, MLA", "float8"] == 61 * 656
    assert sizes["Qwen-2.5 72B, GQA", "bf16"] == 327_680
    assert sizes["LLaMA-3.1 405B, GQA", "bf16"] == 516_096
    read = {row["choice"]: row for row in told["quality"]}
    assert read["float32"]["bits_per_byte"] == pytest.approx(summary["validation_bits_per_byte"], rel=1e-5)
    # 2 layers of 32 + 8 values; a window of 8 tokens in rows of 32.
    assert read["float32"]["bytes_per_token"] == 4 * read["float32, window 8"]["bytes_per_token"] == 2 * 40 * 4
    assert read["int8"]["bytes_per_token"] == 2 * (32 + 4 + 2 * 8)
    assert 0 < abs(read["int8"]["more"]) < abs(read["float32, window 8"]["more"])
    assert (tmp_path / "kv.png").read_bytes().startswith(b"\x89PNG")


def test_plot_is_a_picture(finished):
    run_dir, _ = finished
    out, _ = _run("plot_run.py", run_dir)
    assert Path(out.strip()).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--preset", "tiny", "--mesh.scale-upp", "2"], ["mesh.scale-upp", "mesh.scale-up"]),
    (["--preset", "tiny", "--mesh.scale-up", "4"], ["--mesh.simulate-devices 4"]),
    (["--preset", "tiny", "--data.path", "/no/such/folder"], ["data.path", "/no/such/folder"]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (["--preset", "deepseek_v4"], ["deepseek_v4", "deepseek_v3"]),
        (["--preset", "tiny", "--mesh.scale-up", "5"], ["n_routed_experts (16)", "1*5*1=5"]),
        (["--preset", "tiny", "--model.vocab-size", "100"], ["vocab_size", "100"])]),
])
def test_mistakes_are_explained(arguments, words, tmp_path):
    _, err = _run("train.py", *arguments, "--run-dir", tmp_path / "run", status=2)
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_token_ids_outside_the_vocabulary_are_named(tmp_path):
    ids = np.arange(5000) % 300
    ids[3210] = 777
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    _, err = _run("train.py", *SMALL, "--data.path", tmp_path / "ids.npy", "--run-dir", tmp_path / "run", status=2)
    assert "777" in err
    assert "3210" in err


def test_count_parameters_as_json():
    count = json.loads(_run("count_parameters.py", "--preset", "deepseek_v3", "--json")[0])
    assert round(count["main"] / 1e9, 2) == 671.03


def test_killed_run_resumes(text, tmp_path):
    """SIGKILL, aimed at a run that saves after every step, leaves a usable checkpoint; SIGTERM, sent to the run that
    goes on from there, saves and stops; and a third run ends it."""
    run_dir = tmp_path / "run"
    command = [*SMALL, "--data.path", text, "--run-dir", run_dir, "--checkpoint.every", 1, "--report.evaluate-every", 0,
               "--schedule.horizon-steps", 30]
    _, status, killed = _signalled(signal.SIGKILL, run_dir, *command, "--steps", 100000)
    assert status == -signal.SIGKILL
    out, status, reached = _signalled(signal.SIGTERM, run_dir, *command, "--steps", 100000)
    assert "resuming from step" in out
    assert "asked by a signal" in out
    assert status == 0
    assert reached > killed
    out, _ = _run("train.py", *command, "--steps", reached + 3)
    assert f"resuming from step {reached} " in out
    assert len(_losses(run_dir)) == reached + 3


def _signalled(kill: signal.Signals, run_dir: Path, *command: object) -> tuple[str, int, int]:
    """Output and status of a run that gets this signal a second after it saved, and how many steps it has reported."""
    def saved() -> int:
        return max((int(folder.name) for folder in (run_dir / "checkpoints").glob("*") if folder.name.isdigit()),
                   default=0)
    before, process = saved(), _start("train.py", *command)
    deadline = time.time() + 200
    while time.time() < deadline and saved() <= before:
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()[1][-2000:]
    time.sleep(1.0)
    process.send_signal(kill)
    out, _ = process.communicate(timeout=120)
    return out, process.returncode, len(_losses(run_dir))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(text, tmp_path):
    """2 processes of 2 simulated devices against 1 process of 1, and the checkpoint of the two continues in the one.

    Of a single layer, with experts: both processes compile the step, and what crosses from one to the other is there.
    """
    common = [*TINY, "--model.num-hidden-layers", 1, "--model.first-k-dense-replace", 0,
              "--model.num-nextn-predict-layers", 0, "--data.path", text]
    _run("train.py", *common, "--steps", 4, "--run-dir", tmp_path / "one")
    address = f"127.0.0.1:{_free_port()}"
    processes = [_start("train.py", *common, "--steps", 4, "--mesh.scale-out", 2, "--mesh.scale-up", 2,
                        "--mesh.simulate-devices", 2, "--run-dir", tmp_path / "two",
                        "--distributed.coordinator", address, "--distributed.processes", 2,
                        "--distributed.process", index) for index in range(2)]
    outputs = [process.communicate(timeout=400) for process in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
    assert "step 4/4" in outputs[0][0]
    assert "step " not in outputs[1][0]  # one process reports
    np.testing.assert_allclose(_losses(tmp_path / "two"), _losses(tmp_path / "one"), rtol=1e-5)
    out, _ = _run("train.py", *common, "--steps", 5, "--run-dir", tmp_path / "two")
    assert "resuming from step 4" in out
