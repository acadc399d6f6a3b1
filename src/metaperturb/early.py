"""What is wrong with a command line is said before PyTorch is imported, which takes seconds."""

import ast
import errno
import os
import signal
import sys
from pathlib import Path

from metaperturb.cli import report_error
from metaperturb.config import CommonConfig, MetaTestConfig, MetaTrainConfig, load_config, parse_arguments
from metaperturb.errors import UserError

PROGRAMS = {"metaperturb.meta_train": MetaTrainConfig, "metaperturb.meta_test": MetaTestConfig}
SHIPPED = Path(__file__).parent / "shipped"
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, WSL's, AMD's


def check_command_line() -> None:
    """While Python imports this package for `python -m metaperturb.meta_train …`, check that.

    Ctrl-C then ends the import of PyTorch quietly, until `run_program` takes over. Exits with what is wrong.
    """
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    if module not in PROGRAMS:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cls, source = PROGRAMS[module], Path(__file__).with_name(f"{module.rpartition('.')[2]}.py")
    doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    arguments = parse_arguments(cls, doc, sys.argv[1:], f"python -m {module}")
    try:
        check_places(load_config(cls, arguments.config, arguments.set))
    except UserError as error:
        sys.exit(report_error(error, arguments.traceback))


def check_places(config: CommonConfig) -> None:
    """What settings name must be there: files, folders and, as far as the system tells, GPUs.

    Raises:
        UserError: it is not.
    """
    folder = Path(config.run_dir).absolute()
    try:
        os.stat(folder)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"run_dir: {config.run_dir}: {error.strerror}") from error
    above = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        why = "no permission to write" if above.is_dir() else "no folder"
        raise UserError(f"run_dir: {config.run_dir} cannot be written ({above}: {why})")
    if isinstance(config, MetaTrainConfig):
        data, named, devices, key = config.source, "source_paths", config.gpus, "gpus"
        places = {named: config.source_paths, "split_file": [config.split_file]}
    else:
        data, named, devices, key = config.target, "target_path", config.gpu, "gpu"
        places = {named: config.target_paths}
        if not (folder / "checkpoints").exists():  # a run that goes on needs it no more
            places["init"] = [config.init]
        if config.method == "metaperturb" and config.phi and not (SHIPPED / f"{config.phi}.pt").exists():
            places["phi"] = [config.phi]
    if data == "folder" and len(places[named]) != 1:
        raise UserError(f"{named}: must name one folder or archive, with train/<class>/ and test/<class>/ in it")
    for name, paths in places.items():
        for path in map(str.strip, filter(None, paths)):
            if not os.path.exists(path):
                shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.pt")))
                hint = f" (shipped: {shipped})" if name == "phi" else ""
                raise UserError(f"{name}: {path}: no such file or folder{hint}")
    numbers = [item for item in devices.split(",") if item.strip().isdecimal()]
    if numbers and not any(map(os.path.exists, GPU_DRIVERS)):
        raise UserError(f"{key}: no GPU {numbers[0].strip()} (this machine has no driver of one; 'cpu' works)")
