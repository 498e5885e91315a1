"""Command line: `python -m dfkd_jax.prepare --dataset=cifar100`: prepares a data set once.

This needs TensorFlow (the extra `prepare`) and a network; runs need neither.
"""

import sys
from collections.abc import Sequence
from typing import Any

from dfkd_jax.data import tfds_data, tiny_imagenet
from dfkd_jax.data.data_specs import OWN
from dfkd_jax.data.data_table import SPECS
from dfkd_jax.run.command_line import create_parser, fail
from dfkd_jax.runtime.errors import DataMissing, UserError

_NOTHING_TO_DO = {
    "digits": "digits needs no preparing: they come with dfkd_jax.",
    "folder": "folder needs no preparing: config.dataset.data_dir names the folder that holds "
    "test/CLASS and train/CLASS.",
    "none": "none needs no preparing: such a run has no data.",
}


def prepare(name: str, data_dir: str | None = None) -> str:
    """Download a data set and write it in array_record format, unless that is done.

    Args:
      name: a name that config.dataset.name may have.
      data_dir: the folder of prepared data sets; None for `$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`.

    Returns:
      What was done, one sentence.

    Raises:
      UserError: the name is unknown, TensorFlow is missing, or the data set cannot be prepared.
    """
    if name in _NOTHING_TO_DO:
        return _NOTHING_TO_DO[name]
    if name not in SPECS:
        raise UserError(f"--dataset is {name!r}; allowed are {', '.join((*SPECS, *OWN))}.")
    source = tiny_imagenet if name == "tiny_imagenet" else tfds_data
    try:
        return f"{name} is prepared already, in {source.find(SPECS[name], data_dir)}."
    except DataMissing as error:
        if source is tiny_imagenet:
            root = tfds_data.data_root(data_dir)
            raise UserError(
                f"{name} is fetched by hand: unpack {tiny_imagenet.ARCHIVE} in {root}, so that "
                f"{root / tiny_imagenet.FOLDER} holds {', '.join(tiny_imagenet.PARTS)}."
            ) from error
    builder = _builder(name, data_dir)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # of the network, the disk, or what the server sent
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
        raise UserError(f"{name} could not be prepared in {builder.data_dir}: {reason}.") from error
    try:
        return f"{name} is now prepared, in {tfds_data.find(SPECS[name], data_dir)}."
    except DataMissing as error:  # tensorflow-datasets keeps what is there
        raise UserError(
            f"{builder.data_dir} holds {name} in another file format than array_record; move it "
            "away and repeat the command, or give another --data_dir."
        ) from error


def _builder(name: str, data_dir: str | None) -> Any:
    try:
        import tensorflow  # noqa: F401, as tensorflow-datasets would only miss it half-way
    except ImportError as error:
        raise UserError(
            f"Preparing {name} needs TensorFlow, which cannot be imported ({error}): install the "
            "extra prepare, `pip install -e '.[prepare]'`."
        ) from error
    import tensorflow_datasets as tfds

    tfds_name = SPECS[name].tfds_name
    assert tfds_name is not None
    return tfds.builder(tfds_name, data_dir=str(tfds_data.data_root(data_dir)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what the arguments ask for; the exit code."""
    parser = create_parser("prepare", __doc__)
    parser.add_argument("--dataset", required=True, metavar="NAME", help=", ".join(SPECS))
    parser.add_argument("--data_dir", help="folder of prepared data sets")
    try:
        given = parser.parse_args(arguments)
        print(prepare(given.dataset, given.data_dir))
    except UserError as error:
        return fail(str(error), 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
