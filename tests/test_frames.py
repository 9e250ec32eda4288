"""What an exception that somebody keeps still holds after its frames were released: its lines, and nothing else."""

import gc
import traceback
import weakref

from kani_nb._frames import release_frames


class Weights:
    pass


def raised(call):
    try:
        call()
    except ValueError as error:
        return error
    raise AssertionError


def test_locals_of_all_frames_and_of_what_caused_it_are_dropped_and_the_lines_stay():
    held = []

    def inner():
        weights = Weights()
        held.append(weakref.ref(weights))
        raise KeyError("inner")

    def outer():
        weights = Weights()
        held.append(weakref.ref(weights))
        try:
            inner()
        except KeyError as error:
            raise ValueError("outer") from error

    error = raised(outer)
    assert all(each() is not None for each in held)
    release_frames(error)
    gc.collect()
    assert all(each() is None for each in held)
    assert "raise KeyError" in "".join(traceback.format_exception(error))


def test_what_a_nested_function_had_taken_from_around_it_is_dropped_too():
    """torch calls a module that has a hook through such a function, with the KV cache among its arguments."""
    held = []

    def call(*args):
        def inner():
            raise ValueError(len(args))

        return inner()

    def use():
        weights = Weights()
        held.append(weakref.ref(weights))
        call(weights)

    error = raised(use)
    release_frames(error)
    gc.collect()
    assert held[0]() is None


def test_a_function_that_somebody_else_has_keeps_what_it_needs():
    def make():
        weights = Weights()

        def fails():
            raise ValueError(weights)

        def works():
            return weights

        return fails, works

    fails, works = make()
    release_frames(raised(fails))
    assert isinstance(works(), Weights)
    assert isinstance(raised(fails).args[0], Weights)
    del fails
    assert isinstance(works(), Weights)
