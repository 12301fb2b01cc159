"""Names that the families share."""

from __future__ import annotations


NAMES = (
    "Tom", "Ann", "Bob", "Mia", "Sam", "Eva", "Max", "Zoe", "Ben", "Ida", "Leo", "Amy",
    "Jim", "Kim", "Dan", "Liz", "Ron", "Sue", "Tim", "Joy", "Ray", "Pam", "Gus", "Fay",
)  # fmt: skip
