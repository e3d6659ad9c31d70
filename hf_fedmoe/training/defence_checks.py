"""Checks before a run that its method and its uploads can do with the defences that are asked for."""

from ..federation import Strategy, make_defence
from ..federation.screens import Krum, attackers
from ..weights import fuse_models_
from .federated_arguments import FederatedTrainingArguments


def check_defence(args: FederatedTrainingArguments, strategy: Strategy) -> None:
    """Raises `ValueError` that names the field, its value and the remedy, where a defence would do nothing or harm."""
    defence = make_defence(args.robust_fusion, args.expected_attackers, args.max_update_norm_ratio)
    for name in ("robust_fusion", "max_update_norm_ratio"):
        if vars(args)[name] is not None and args.client_parallelism == "sums":
            raise ValueError(
                f"`{name}` is {vars(args)[name]!r}, which compares single uploads, but with `client_parallelism` = "
                f"'sums' nobody has all of them: choose \"clients\", or leave `{name}` out."
            )
    if defence.screens and not strategy.compressible:
        name = "max_update_norm_ratio" if args.max_update_norm_ratio is not None else "robust_fusion"
        raise ValueError(
            f"`{name}` is {vars(args)[name]!r}, but in {strategy.name!r} no receiver knows the model that an update "
            "starts from: leave it out."
        )
    if defence.fuse_ is not fuse_models_ and strategy.needs == "rows":
        raise ValueError(
            f"`robust_fusion` is {args.robust_fusion!r}, but {strategy.name!r} fuses uploads by itself (`needs`): "
            'take "krum" or "multi_krum", which only choose among uploads, or leave it out. (Fed-MoE leaves fusion to '
            'it where `synchronisation` is "download_main" or "download_mixture".)'
        )
    m = args.clients_per_round
    f = attackers(args.expected_attackers, m)
    if any(isinstance(screen, Krum) for screen in defence.screens) and m < 2 * f + 3:
        raise ValueError(
            f"`robust_fusion` is {args.robust_fusion!r}, and of `clients_per_round` = {m} with `expected_attackers` = "
            f"{args.expected_attackers} there may be f = {f} hostile, for which Krum needs 2 f + 3 = {2 * f + 3} "
            "clients: raise `clients_per_round`, or lower `expected_attackers`."
        )


def check_products(args: FederatedTrainingArguments) -> None:
    """Raises `ValueError` where LoRA's products are to be fused by what takes the entries of their factors."""
    if args.lora_fusion == "svd" and make_defence(args.robust_fusion, args.expected_attackers).by_entries:
        raise ValueError(
            f"`robust_fusion` is {args.robust_fusion!r}, which takes each entry by itself, but with `lora_fusion` = "
            "'svd' products of two factors are fused, which have no entries of their own: take lora_fusion=\"ffa\", "
            'or "geometric_median", "krum" or "multi_krum".'
        )
