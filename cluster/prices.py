"""The editable table behind a plan: kinds of machines, what they cost, how fast they are, how often spot ones go."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pu_ray.errors import ConfigError
from pu_ray.usage import HourPrices

PRICES_FILE = Path(__file__).with_name("prices.yaml")


class Table(BaseModel):
    """Plain closed data, as it goes in and out of a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NodePrice(Table):
    """A kind of machine."""

    cpus: int = Field(ge=1)
    gpus: int = Field(ge=0)
    memory_gib: float = Field(gt=0)
    price_per_hour: float = Field(ge=0)


class NodePrices(Table):
    """The two kinds a plan reckons with."""

    cpu: NodePrice
    gpu: NodePrice

    @model_validator(mode="after")
    def _gpu_nodes_have_gpus(self) -> Self:
        if self.gpu.gpus == 0:
            raise ValueError("nodes of the kind gpu need at least one GPU, got 0")
        return self


class Spot(Table):
    """Nodes that are cheaper and may be taken away.

    Attributes:
        price_frac: Their price, as a fraction of `price_per_hour`.
        interruptions_per_node_hour: How often one of them is taken away.
    """

    price_frac: float = Field(gt=0, le=1)
    interruptions_per_node_hour: float = Field(ge=0)


class Rates(Table):
    """What one core or one GPU sustains."""

    cpu_core_gflop_per_s: float = Field(gt=0)
    gpu_tflop_per_s: float = Field(gt=0)
    decode_mb_per_s_per_core: float = Field(gt=0)
    image_us: float = Field(ge=0)


class Prices(Table):
    """The table."""

    currency: str
    nodes: NodePrices
    start_s: float = Field(ge=0)
    spot: Spot
    rates: Rates
    assumed_prior: float = Field(gt=0, lt=1)

    def per_hour(self) -> HourPrices:
        """What a core and a GPU cost that are held for an hour, each as its share of a whole node on demand."""
        cpu, gpu = self.nodes.cpu, self.nodes.gpu
        return HourPrices(
            currency=self.currency,
            cpu_hour=cpu.price_per_hour / cpu.cpus,
            gpu_hour=gpu.price_per_hour / gpu.gpus,
            cores_with_gpu=gpu.cpus / gpu.gpus,
        )


def load(path: Path = PRICES_FILE) -> Prices:
    """The table of rates and prices.

    Raises:
        ConfigError: The file cannot be read or lacks something.
    """
    try:
        return Prices.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            "the price table cannot be read",
            slug="price-table-unreadable",
            where=str(path),
            got=str(error),
            hint="copy cluster/prices.yaml and edit the copy",
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            "the price table is wrong",
            slug="price-table-invalid",
            where=f"{path}: {where}" if where else str(path),
            got=first["msg"],
            hint="cluster/prices.yaml has every field, with its unit",
        ) from error
