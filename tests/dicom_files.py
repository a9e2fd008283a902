"""Writes CT series as DICOM files, as a scanner would, for the tests that read them."""

import struct

import numpy as np
import pydicom
from pydicom import datadict
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

HEAD_FIRST = (1, 0, 0, 0, 1, 0)


def write_series(
    folder,
    hu,
    *,
    first_mm=(-30.0, -20.0, 5.0),
    spacing_mm=(2.5, 2.0, 3.0),
    turn=HEAD_FIRST,
    series="1.2.3",
    study="1.2",
    patient="P1",
    number=2,
    acquisition=1,
    description="CT",
    first_instance=1,
    intercept=-1024,
    step_mm=None,
    prefix="1-",
    edit=lambda item, k: None,
):
    """Writes hu [X, Y, Z] (columns, rows, slices); returns the files' paths.

    `edit(item, k)` may spoil slice k before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    right, down = np.array(turn[:3], float), np.array(turn[3:], float)
    step = np.cross(right, down) * spacing_mm[2] if step_mm is None else step_mm
    paths = []
    for k in range(hu.shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(k)])
        path = folder / f"{prefix}{first_instance + k:03d}.dcm"
        item = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        item.SOPClassUID = CTImageStorage
        item.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        item.PatientID, item.StudyInstanceUID = patient, study
        item.StudyDate, item.Modality = "19971227", "CT"
        item.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        item.SeriesInstanceUID, item.SeriesNumber = series, number
        item.SeriesDescription = description
        item.AcquisitionNumber, item.InstanceNumber = acquisition, first_instance + k
        item.FrameOfReferenceUID = study + ".9"
        item.Columns, item.Rows = hu.shape[:2]
        item.PixelSpacing = [spacing_mm[1], spacing_mm[0]]  # rows first
        item.SliceThickness = spacing_mm[2]
        item.ImageOrientationPatient = list(turn)
        place = np.array(first_mm) + k * np.asarray(step)
        item.ImagePositionPatient = [f"{v:.4f}" for v in place]
        item.RescaleSlope, item.RescaleIntercept = 1, intercept
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
        item.PixelRepresentation = 1
        stored = (hu[:, :, k].T - intercept).astype("<i2")
        item.PixelData = np.ascontiguousarray(stored).tobytes()
        edit(item, k)
        pydicom.dcmwrite(path, item)
        paths.append(path)
    return paths


def respell(path, tag, text):
    """Gives a short tag of a file other text, which pydicom would not write."""
    number = datadict.tag_for_keyword(tag)
    key = struct.pack("<HH", *divmod(number, 1 << 16))
    key += datadict.dictionary_VR(number).encode()
    before, found, after = path.read_bytes().partition(key)
    assert found
    size = int.from_bytes(after[:2], "little")
    value = text.encode() + b" " * (len(text) % 2)
    length = len(value).to_bytes(2, "little")
    path.write_bytes(before + key + length + value + after[2 + size :])
