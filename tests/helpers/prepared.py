"""Data sets as preparing them leaves them, written without TensorFlow."""

import io
import json

import numpy as np
from PIL import Image


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(
        buffer, kind, **({"quality": 95} if kind != "PNG" else {})
    )
    return buffer.getvalue()


def prepare_tfds(root, name, version, splits, image_shape, num_classes=10):
    """Write what `tfds build --file_format=array_record` would, without TensorFlow."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    folder = root / name / version
    folder.mkdir(parents=True)
    infos = []
    for split, (images, labels) in splits.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for image, label in zip(images, labels, strict=True):
            encoded = tf_feature_pb2.BytesList(value=[encode(image)])
            number = tf_feature_pb2.Int64List(value=[int(label)])
            feature = {
                "image": tf_feature_pb2.Feature(bytes_list=encoded),
                "label": tf_feature_pb2.Feature(int64_list=number),
            }
            features = tf_feature_pb2.Features(feature=feature)
            writer.write(tf_example_pb2.Example(features=features).SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        lengths = [str(len(labels))]
        infos.append({"name": split, "shardLengths": lengths, "filepathTemplate": template})
    module = "tensorflow_datasets.core.features."
    image = {"dtype": "uint8", "shape": {"dimensions": [str(n) for n in image_shape]}}
    features = {
        "image": {"image": image, "pythonClassName": module + "image_feature.Image"},
        "label": {
            "classLabel": {"numClasses": str(num_classes)},
            "pythonClassName": module + "class_label_feature.ClassLabel",
        },
    }
    tree = {
        "featuresDict": {"features": features},
        "pythonClassName": module + "features_dict.FeaturesDict",
    }
    (folder / "features.json").write_text(json.dumps(tree))
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def random_split(n, shape, seed, num_classes=10):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, num_classes, n)
