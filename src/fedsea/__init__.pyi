from fedsea.client.causal_lm import SplitCausalLM
from fedsea.client.options import ClientOptions
from fedsea.client.results import evaluate
from fedsea.client.results import export_adapter as export
from fedsea.client.run import train, train_alone
from fedsea.errors import FedseaError
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_input_blocks, load_output_blocks, load_trunk
from fedsea.plan import FederationPlan, load_plan
from fedsea.server.run import ServerOptions, serve
from fedsea.types import Partition

__version__: str
__all__ = [
    "ClientOptions",
    "FederationPlan",
    "FedseaError",
    "Partition",
    "ServerOptions",
    "SplitCausalLM",
    "__version__",
    "evaluate",
    "export",
    "load_input_blocks",
    "load_output_blocks",
    "load_plan",
    "load_trunk",
    "open_checkpoint",
    "serve",
    "train",
    "train_alone",
]
