"""Values on the command line: what is accepted, what is refused with an example, and how sizes are shown."""

import argparse

import pytest

from vmm.cli import values


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("64M", 64 << 20), ("1G", 1 << 30), ("65536", 65536), ("512K", 512 << 10), ("2T", 2 << 40),
        ("64m", 64 << 20), ("64MiB", 64 << 20), ("64MB", 64 << 20), ("0x10000", 65536), ("0x10K", 16384), ("0010", 10),
    ],
)  # fmt: skip
def test_size(text: str, bytes_: int) -> None:
    assert values.size(text) == bytes_


@pytest.mark.parametrize("text", ["", "M", "0", "-1", "1.5G", "64Q", "1e6", "64 M B", "٤M", "9999T", "0x", "64MM"])
def test_size_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        values.size(text)


def test_policy_is_hex_of_32_bits() -> None:
    assert values.policy("3") == values.policy("0x3") == 3
    assert values.policy("10") == 0x10
    for text in ("", "0x", "-1", "100000000", "3g", "1_0"):
        with pytest.raises(argparse.ArgumentTypeError):
            values.policy(text)


def test_timeout_zero_is_no_limit() -> None:
    assert values.timeout("0.5") == 0.5
    assert values.timeout("0") is None
    for text in ("-1", "nan", "inf", "x", "", "1e12"):
        with pytest.raises(argparse.ArgumentTypeError):
            values.timeout(text)


def test_vcpus() -> None:
    assert [values.vcpus(text) for text in ("1", "64")] == [1, 64]
    for text in ("0", "65", "-1", "1.0", "", "²"):
        with pytest.raises(argparse.ArgumentTypeError):
            values.vcpus(text)


def test_arguments_fit_the_boot_info() -> None:
    assert values.arguments("x" * 1023)
    for text in ("x" * 1024, "é" * 512, "a\0b"):
        with pytest.raises(argparse.ArgumentTypeError):
            values.arguments(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (100, "100 B"), (4096, "4 KiB"), (0x10000, "64 KiB"), (4 << 20, "4 MiB"), (3 << 30, "3 GiB"),
        ((4 << 20) + 4096, "4100 KiB"), ((1 << 30) + (1 << 20), "1025 MiB"),
    ],
)  # fmt: skip
def test_show_size(count: int, text: str) -> None:
    assert values.show_size(count) == text
