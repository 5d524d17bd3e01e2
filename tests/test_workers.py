"""Trainings side by side: what comes back of a task that failed."""

from beyondlora.workers import side_by_side


class NeedsTwoError(Exception):
    """It pickles, and to unpickle it takes an argument that pickle does not keep."""

    def __init__(self, reason, number):
        super().__init__(f"{reason} {number}")


def fail_at_one(number, _progress):
    if number == 1:
        raise NeedsTwoError("the real reason", 2)
    return number


def test_an_exception_that_does_not_unpickle_is_told_in_its_words_and_the_others_go_on():
    found = dict(side_by_side(fail_at_one, [(0,), (1,), (2,)], count=1))
    assert (found[0], found[2]) == (0, 2)
    assert isinstance(found[1], RuntimeError)
    assert "NeedsTwoError: the real reason 2" in str(found[1])
