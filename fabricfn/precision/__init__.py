"""How numbers are represented: records, their names, and the packages that compute in 8 bits and fewer."""

from fabricfn.precision.bitsandbytes import Quantized as Quantized
from fabricfn.precision.float8 import Float8 as Float8
from fabricfn.precision.records import (
    ALIASES as ALIASES,
    NAMES as NAMES,
    PACKAGED as PACKAGED,
    DynamicScale as DynamicScale,
    Precision as Precision,
    autocast_of as autocast_of,
    cast_floating as cast_floating,
    check_name as check_name,
)
from fabricfn.precision.transformer_engine import TransformerEngine as TransformerEngine
