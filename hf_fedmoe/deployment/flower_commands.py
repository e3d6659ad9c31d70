"""The app that `hf-fedmoe server` has SuperLink run."""

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..federation import write_json
from .federation_file import make_server_trainer, read_federation
from .flower_apps import server_app
from .launching import END_NAME
from .link import Link
from .server_trainer import ServerTrainer


def command_server_app() -> ServerApp:
    """Makes the app of `hf-fedmoe server`, whose run configuration names the YAML."""

    def make_trainer(link: Link, context: Context) -> ServerTrainer:
        return make_server_trainer(str(context.run_config["federation"]), link)

    run, app = server_app(make_trainer), ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        output_dir = Path(str(read_federation(str(context.run_config["federation"]))[1]["output_dir"]))
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / END_NAME, {"pid": os.getpid()})
        fault = None
        try:
            run(grid, context)
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"
            raise
        finally:
            write_json(output_dir / END_NAME, {"fault": fault})

    return app
