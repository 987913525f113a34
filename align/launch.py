"""Starts a stage in several processes, and stops where the world is not the one asked for.

`align sft --num-processes 2` runs this module in a process of its own, which starts accelerate's
launcher with the same arguments. A stage that torchrun, `accelerate launch` or srun started passes
through. Two things go wrong silently elsewhere and are errors here: `accelerate launch --cpu
--num_processes 2` starts one process, and FSDP without GPUs becomes plain data parallelism.
"""

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import MutableMapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from align.config.sections import LaunchSection
from align.config.sharding import SWITCHES, turned_on
from align.config.yaml import read
from align.errors import AlignError, fail
from align.resources import accelerate_config, accelerate_names, display

ACCELERATE_MARK = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
"""Set by `accelerate launch` alone, for one process as for many."""


PATIENCE = timedelta(hours=2)
"""How long processes wait for one that works alone (proves a reward model, writes a large artifact)."""

DEEPSPEED = (0, 19)
"""The oldest DeepSpeed: before it rotary frequencies were rounded to bfloat16 with the weights."""


def launched_world() -> int | None:
    """How many processes a launcher started; None where no launcher started this one.

    Under srun the variables that torch reads are set from Slurm's first.
    """
    adopt_slurm(os.environ)
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return 1 if ACCELERATE_MARK in os.environ else None


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Inside an srun step of several tasks: RANK, WORLD_SIZE, ... from Slurm's own variables."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or not tasks.isdigit() or int(tasks) < 2:
        return
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    port = 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = tasks
    environment.setdefault("MASTER_ADDR", first_host(nodes) or "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(port))


def first_host(nodes: str) -> str:
    """The first name of Slurm's node list: `gpu[03-07,9]-ib,other` is `gpu03-ib`."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^\[,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


def needs_launch(launch: LaunchSection) -> bool:
    """Whether this process has to start the stage under a launcher instead of running it."""
    wanted = launch.num_processes > 1 or launch.accelerate is not None
    return wanted and launched_world() is None


def _config(launch: LaunchSection) -> tuple[Path, dict[str, Any]]:
    """The accelerate config of a stage and what it says; plain data parallelism when unset."""
    name = launch.accelerate or "ddp"
    path = accelerate_config(name)
    if path is None:
        hint = f"name a file, or a shipped one: {', '.join(accelerate_names())}"
        fail("no such accelerate config", where=f"launch.accelerate: {name}", hint=hint)
    return path, read(path, display(path)).data


def _asked(launch: LaunchSection) -> int | None:
    """The number of processes that somebody asked for; None where nobody did."""
    if "num_processes" in launch.model_fields_set:
        return launch.num_processes
    given = _config(launch)[1].get("num_processes") if launch.accelerate else None
    return given if isinstance(given, int) else None


def relaunch(argv: Sequence[str], launch: LaunchSection) -> int:
    """Run `align ARGV` in as many processes as `launch` asks for; returns the exit code.

    Ctrl-C and SIGTERM are passed on once, so that every process can stop in order.
    """
    path, _ = _config(launch)
    asked = _asked(launch)
    command = [sys.executable, "-m", "align.launch", "--config_file", str(path)]
    command += ["--num_processes", str(asked)] if asked else []
    root = str(Path(__file__).resolve().parent.parent)
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # A process group of its own: the terminal's Ctrl-C would reach every process a second time.
    process = subprocess.Popen(
        [*command, "--module", "align", *argv],
        env=os.environ | {"PYTHONPATH": search},
        process_group=0,
    )

    def forward(signum: int, _: FrameType | None) -> None:
        process.send_signal(signum)

    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    kept = {number: signal.signal(number, forward) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def check_world(launch: LaunchSection) -> None:
    """Inside the process that runs a stage: join the other processes, or refuse the world.

    Raises:
        AlignError: other than the asked number of processes run, or sharding was asked for and
            is not in force.
    """
    world = launched_world()
    if world == 1 and "RANK" not in os.environ and "MASTER_ADDR" in os.environ:
        _refuse_silent_single()
    asked = _asked(launch)
    if asked is not None and asked != (world or 1):
        fail(
            f"{asked} processes were asked for, and {world or 1} run",
            where=f"launch.num_processes: {asked}",
            hint="let the launcher start that many, or leave the launcher out: "
            "align starts its own processes",
        )
    kind = str(_config(launch)[1].get("distributed_type")) if launch.accelerate else ""
    for name in SWITCHES:
        if kind == name and not turned_on(name):
            fail(
                f"asks for {name}, and the launcher did not turn it on",
                where=f"launch.accelerate: {launch.accelerate}",
                hint="use `accelerate launch --config_file` with that file, or no launcher",
            )
    if world is not None and (world > 1 or any(map(turned_on, SWITCHES))):
        _join(world)


def _refuse_silent_single() -> NoReturn:
    fail(
        "`accelerate launch` was asked for several processes and started one",
        hint="use `align ... --num-processes N`, `torchrun --nproc-per-node N`, or "
        "`accelerate launch --multi_gpu --num_processes N` (this works without GPUs too); "
        "for one process, unset MASTER_ADDR",
    )


def _require_deepspeed() -> None:
    from importlib.metadata import PackageNotFoundError, version

    hint = (
        "pip install 'align[deepspeed]' (after torch, with DS_BUILD_OPS=0 and --no-build-isolation)"
    )
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        fail("DeepSpeed is not installed", where="launch.accelerate", hint=hint)
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < DEEPSPEED:
        fail(f"DeepSpeed {found} is too old", where="launch.accelerate", hint=hint)


def join_state() -> Any:
    """Join the process group, for as long as a main process may work alone while the others wait.

    The first PartialState decides for the whole process: without `cpu=True` it takes a machine without GPUs for a
    single process, whatever was launched. With it accelerate turns FSDP and DeepSpeed off without a word, which both
    run on CPUs too, over gloo.
    """
    import torch
    from accelerate import DistributedType, PartialState

    if turned_on("DEEPSPEED"):
        _require_deepspeed()
    if torch.accelerator.is_available():
        return PartialState(timeout=PATIENCE)
    if turned_on("DEEPSPEED"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # A quicker collective between CPUs, which would need a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        return PartialState(backend="gloo", timeout=PATIENCE)
    state = PartialState(cpu=True, timeout=PATIENCE)
    if turned_on("FSDP"):
        state.distributed_type = DistributedType.MULTI_GPU  # of which accelerate makes FSDP
    return state


def _join(world: int) -> None:
    state = join_state()
    # A process that ends with its group still open may abort in gloo's threads, work done or not.
    atexit.register(state.destroy_process_group)
    if state.num_processes != world:
        fail(
            f"{world} processes were started, and accelerate sees {state.num_processes}",
            hint="start the stage with `align ... --num-processes N`",
        )


def main(arguments: Sequence[str]) -> int:
    """Run accelerate's launcher with its own arguments, and give the exit code of what it ran.

    Of several processes the first that failed decides. Imports torch and accelerate.
    """
    import logging

    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the processes tell what is wrong themselves
    given = launch_command_parser().parse_args(list(arguments))
    config = read(Path(given.config_file), given.config_file).data
    gpus = torch.accelerator.device_count()
    if given.num_processes is None:
        given.num_processes = config.get("num_processes") or gpus
        if not given.num_processes:
            fail(
                "it is not said how many processes to start, and there is no GPU to count",
                where=f"launch.accelerate: {given.config_file}",
                hint="add --num-processes N",
            )
    if not gpus:
        threads = max(1, (os.cpu_count() or 1) // given.num_processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        launch_command(given)
    except ChildFailedError as error:
        return _code_of_all([failure.exitcode for failure in error.failures.values()])
    except subprocess.CalledProcessError as error:
        return _code(error.returncode)
    except SignalException as error:
        return 128 + int(error.sigval)
    except (ImportError, ValueError, OSError) as error:
        fail(f"accelerate cannot launch: {error}", where=f"launch.accelerate: {given.config_file}")
    return 0


def _code_of_all(codes: Sequence[int]) -> int:
    """The exit code of processes that failed together: of one that failed by itself, where there is one.

    When one fails, the launcher ends the others with a signal; which of them it names as the first is chance.
    """
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL)
    return _code(next((code for code in codes if code not in ended), codes[0]))


def _code(code: int) -> int:
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    from align.answers import answer

    try:
        sys.exit(main(sys.argv[1:]))
    except AlignError as error:
        sys.exit(answer(error))
