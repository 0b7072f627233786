"""The rule table: one row per operator, by family. See `autopar.sharding.rule` for the notation."""

from autopar.sharding.rules.call import Call
from autopar.sharding.rules.registry import bind, describe_missing, has_rule

__all__ = ["Call", "bind", "describe_missing", "has_rule"]
