"""Tests of benchmarks/device_options.py."""

import argparse

import pytest

from benchmarks.device_options import parse_with_device


def parse(*argv: str) -> argparse.Namespace:
    return parse_with_device(argparse.ArgumentParser(), argv, repeats=7)


def test_only_a_gpu_is_compiled_for_unless_told_otherwise():
    assert parse("--device", "cuda:1").compile
    assert not parse("--device", "cpu").compile
    assert parse("--device", "cpu", "--compile").compile
    assert not parse("--device", "cuda", "--no-compile").compile


@pytest.mark.parametrize(("argv", "repeats"), [((), 7), (("--tiny",), 2), (("--tiny", "--repeats", "5"), 5)])
def test_a_toy_model_is_timed_less_often(argv, repeats):
    assert parse(*argv).repeats == repeats
