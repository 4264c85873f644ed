"""Weight initialization: on a tensor, on a whole model by its structure, or from data."""

from fastnorm.init.data import lsuv
from fastnorm.init.fans import Fans, fans
from fastnorm.init.model import initialize
from fastnorm.init.report import Initialized, InitReport
from fastnorm.init.schemes import (
    he_normal_,
    he_uniform_,
    lecun_normal_,
    lecun_uniform_,
    orthogonal_,
    xavier_normal_,
    xavier_uniform_,
)

__all__ = [
    "initialize",
    "lsuv",
    "InitReport",
    "Initialized",
    "xavier_uniform_",
    "xavier_normal_",
    "he_uniform_",
    "he_normal_",
    "lecun_uniform_",
    "lecun_normal_",
    "orthogonal_",
    "Fans",
    "fans",
]
