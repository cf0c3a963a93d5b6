"""Functional, explicit-state training of PyTorch models: pure functions of an immutable `Runtime`; nothing is wrapped.

Start with `docs/loop.md`. `import fabricfn` imports nothing: a name is looked up in its file when it is first used.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fabricfn import (
        errors as errors,
        loggers as loggers,
        precision as precision,
        strategies as strategies,
        testing as testing,
    )
    from fabricfn.averaging import ema as ema, swa as swa
    from fabricfn.checkpoint import (
        CheckpointType as CheckpointType,
        Loaded as Loaded,
        Receipt as Receipt,
        Saving as Saving,
        consolidate as consolidate,
        diff_checkpoints as diff_checkpoints,
        inspect_checkpoint as inspect_checkpoint,
        latest as latest,
        list_checkpoints as list_checkpoints,
        load as load,
        load_raw as load_raw,
        prune_checkpoints as prune_checkpoints,
        retained as retained,
        save as save,
        verify_checkpoint as verify_checkpoint,
    )
    from fabricfn.clipping import clip_gradients as clip_gradients
    from fabricfn.collectives import (
        all_gather as all_gather,
        all_gather_object as all_gather_object,
        all_reduce as all_reduce,
        all_to_all as all_to_all,
        barrier as barrier,
        broadcast as broadcast,
        gather as gather,
        recv as recv,
        reduce_scatter as reduce_scatter,
        scatter as scatter,
        send as send,
    )
    from fabricfn.compiling import compile_step as compile_step
    from fabricfn.data import (
        batches as batches,
        setup_dataloader as setup_dataloader,
        setup_dataloaders as setup_dataloaders,
    )
    from fabricfn.errors import (
        CapabilityError as CapabilityError,
        CheckpointError as CheckpointError,
        ConfigurationError as ConfigurationError,
        DataError as DataError,
        DonatedError as DonatedError,
        FabricfnError as FabricfnError,
        GradientError as GradientError,
        HangError as HangError,
        LaunchError as LaunchError,
        MismatchError as MismatchError,
        ModelError as ModelError,
        PeerError as PeerError,
    )
    from fabricfn.facts import environment_report as environment_report
    from fabricfn.figures import (
        flush_logs as flush_logs,
        log as log,
        log_dict as log_dict,
        log_graph as log_graph,
        log_hyperparams as log_hyperparams,
        log_image as log_image,
        log_text as log_text,
    )
    from fabricfn.gathering import gather_params as gather_params, to_module as to_module, unsharded as unsharded
    from fabricfn.generators import (
        random_state as random_state,
        seed_everything as seed_everything,
        set_random_state as set_random_state,
    )
    from fabricfn.gradients import accumulate as accumulate, value as value, value_and_grad as value_and_grad
    from fabricfn.hooks import call as call
    from fabricfn.meters import (
        Throughput as Throughput,
        learning_rates as learning_rates,
        rates as rates,
        throughput as throughput,
    )
    from fabricfn.model import (
        apply as apply,
        autocast as autocast,
        init_module as init_module,
        setup_model as setup_model,
    )
    from fabricfn.modes import eval_mode as eval_mode, map_params as map_params, train_mode as train_mode
    from fabricfn.optimizers import (
        optimizer_step as optimizer_step,
        reduce_on_plateau as reduce_on_plateau,
        schedule_from_torch as schedule_from_torch,
        setup_optimizer as setup_optimizer,
    )
    from fabricfn.patience import EarlyStopping as EarlyStopping, early_stopping as early_stopping
    from fabricfn.peaks import available_flops as available_flops, measure_flops as measure_flops
    from fabricfn.pipelining import (
        pipeline_value as pipeline_value,
        pipeline_value_and_grad as pipeline_value_and_grad,
    )
    from fabricfn.precision import DynamicScale as DynamicScale, Precision as Precision
    from fabricfn.progress_bars import progress as progress
    from fabricfn.random import Key as Key, fold_in as fold_in, key as key, split as split
    from fabricfn.records import Cursor as Cursor, Grads as Grads, Model as Model
    from fabricfn.replicas import check_replicas as check_replicas
    from fabricfn.reporting import (
        is_shared_filesystem as is_shared_filesystem,
        print as print,
        rank_zero_first as rank_zero_first,
        run_once as run_once,
    )
    from fabricfn.runtimes import Runtime as Runtime
    from fabricfn.scaling import LossScale as LossScale
    from fabricfn.spikes import SpikeGuard as SpikeGuard, spike_guard as spike_guard
    from fabricfn.starting.beginning import init_runtime as init_runtime, runtime as runtime
    from fabricfn.starting.joining import shutdown as shutdown
    from fabricfn.starting.launching import launch as launch
    from fabricfn.states import Optimizer as Optimizer
    from fabricfn.stopping import should_stop as should_stop
    from fabricfn.strategy import Strategy as Strategy
    from fabricfn.transfers import to_device as to_device
    from fabricfn.tree import tree_map as tree_map
    from fabricfn.world import World as World
else:
    from importlib import import_module

    # Where each public name lives, by task; tests/test_public.py holds it equal to the imports above.
    _ROOMS = {
        # starting and stopping
        "starting.beginning": "init_runtime runtime",
        "starting.joining": "shutdown",
        "starting.launching": "launch",
        "facts": "environment_report",
        "runtimes": "Runtime",
        "world": "World",
        "precision": "Precision DynamicScale",
        "strategy": "Strategy",
        # the model, its gradients, the optimizer
        "model": "setup_model init_module apply autocast",
        "gathering": "gather_params to_module unsharded",
        "modes": "eval_mode train_mode map_params",
        "gradients": "value_and_grad value accumulate",
        "pipelining": "pipeline_value_and_grad pipeline_value",
        "clipping": "clip_gradients",
        "compiling": "compile_step",
        "optimizers": "setup_optimizer optimizer_step schedule_from_torch reduce_on_plateau",
        "states": "Optimizer",
        "records": "Model Grads Cursor",
        "scaling": "LossScale",
        # data
        "data": "setup_dataloader setup_dataloaders batches",
        "transfers": "to_device",
        # checkpoints
        "checkpoint": (
            "save load load_raw consolidate latest list_checkpoints verify_checkpoint inspect_checkpoint"
            " diff_checkpoints retained prune_checkpoints Receipt Saving Loaded CheckpointType"
        ),
        # what a training loop is made up of
        "patience": "early_stopping EarlyStopping",
        "averaging": "ema swa",
        "meters": "throughput rates Throughput learning_rates",
        "peaks": "measure_flops available_flops",
        "spikes": "spike_guard SpikeGuard",
        # between ranks
        "collectives": (
            "all_reduce all_gather broadcast reduce_scatter gather scatter all_to_all send recv barrier"
            " all_gather_object"
        ),
        "reporting": "print run_once rank_zero_first is_shared_filesystem",
        "figures": "log log_dict log_hyperparams log_text log_image log_graph flush_logs",
        "hooks": "call",
        "progress_bars": "progress",
        "replicas": "check_replicas",
        "stopping": "should_stop",
        # what can go wrong
        "errors": (
            "FabricfnError ConfigurationError CapabilityError ModelError DonatedError GradientError MismatchError"
            " PeerError HangError LaunchError DataError CheckpointError"
        ),
        # trees and randomness
        "tree": "tree_map",
        "random": "key fold_in split Key",
        "generators": "seed_everything random_state set_random_state",
    }
    _HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}
    _MODULES = ("errors", "loggers", "precision", "strategies", "testing")
    __all__ = list(_HOMES) + list(_MODULES)

    def __getattr__(name):
        if name in _MODULES:
            return import_module(f"fabricfn.{name}")
        if name not in _HOMES:
            raise AttributeError(
                f"fabricfn has no {name!r}. Every name is in docs/reference.md; the names of Lightning Fabric and what"
                " replaces them are in docs/coming-from-fabric.md."
            )
        found = globals()[name] = getattr(import_module(f"fabricfn.{_HOMES[name]}"), name)
        return found

    def __dir__():
        return __all__
