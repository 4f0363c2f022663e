"""Functions and commands on two real gloo processes, as `torchrun` would start them."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch

# Imported once a worker, in a process that others are forked from: two ranks cost no imports.
_IMPORTED = [
    "mergevq.cli.main",
    "mergevq.training.train",
    "mergevq.evaluate.reconstruction",
    "mergevq.evaluate.generation",
    "mergevq.tokenizer.encode",
]


def run_on_ranks(function: Callable[..., None], *arguments: object, num_ranks: int = 2) -> None:
    """`function(rank, *arguments)` in processes of its own; an error when one ends with one."""
    multiprocessing.set_forkserver_preload(_IMPORTED)
    torch.multiprocessing.start_processes(
        function, args=arguments, nprocs=num_ranks, start_method="forkserver"
    )


def take_place(rank: int, port: int) -> None:
    """Be one of two ranks, as torchrun would say it."""
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_command(rank: int, port: int, arguments: list[str]) -> None:
    from mergevq.cli.main import main

    take_place(rank, port)
    assert main(arguments) == 0


def run_training(rank: int, port: int, run: object) -> None:
    from mergevq.training.train import train

    take_place(rank, port)
    train(run, resume=False)


def run_on_two_ranks(arguments: list[str]) -> None:
    """`mergevq ARGUMENTS` on each of two processes; an error when one of them ends with one."""
    run_on_ranks(run_command, free_port(), arguments)


def train_on_two_ranks(run: object) -> None:
    """A run of training on two processes; an error when one of them ends with one."""
    run_on_ranks(run_training, free_port(), run)
