"""One module per kind of dataset: raw files -> list of records.

`read(folder)` of each takes a folder as it was downloaded and unpacked, has no options,
and gives a `manifest.Collection`. A dataset of your own needs a manifest, or one more
module and its row here.
"""

from data_pipeline.datasets import (
    amos,
    dirlab4dct,
    flare,
    hcc_tace,
    l2r2020_abdomen,
    learn2reg,
    nnunet,
    segrap2023,
    totalsegmentator,
)

DATASETS = {
    "amos": amos.read,
    "dirlab4dct": dirlab4dct.read,
    "flare": flare.read,
    "hcc_tace": hcc_tace.read,
    "l2r2020_abdomen": l2r2020_abdomen.read,
    "learn2reg": learn2reg.read,
    "nnunet": nnunet.read,
    "segrap2023": segrap2023.read,
    "totalsegmentator": totalsegmentator.read,
}
