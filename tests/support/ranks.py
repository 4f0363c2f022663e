"""A command on two real gloo processes, as `torchrun` would start them."""

import os
import socket

import torch

from mergevq.cli.main import main


def run_rank(rank: int, port: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert main(arguments) == 0


def run_on_two_ranks(arguments: list[str]) -> None:
    """`mergevq ARGUMENTS` on each of two processes; an error when one of them ends with one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(port, arguments), nprocs=2)
