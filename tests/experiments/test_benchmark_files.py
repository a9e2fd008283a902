"""What the benchmark of files times: every tool writes the same scan and field."""

import numpy as np
import pytest

sitk = pytest.importorskip("SimpleITK")

from experiments import benchmark_files as files  # noqa: E402


def test_all_tools_write_the_same(tmp_path):
    hu, disp_mm = (part[::8, ::8] for part in files.make(12))
    hu, disp_mm = np.ascontiguousarray(hu), np.ascontiguousarray(disp_mm)
    assert 2 < np.abs(disp_mm).max() < 40 and hu.std() > 100
    for name, run in files.candidates(tmp_path, hu, disp_mm).items():
        assert (run() is not None) == name.startswith("read"), name

    def array(name):
        return sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name)))

    for tool in ("ours", "SimpleITK"):
        np.testing.assert_array_equal(array(f"scan_{tool}.nii.gz").T, hu)
        wanted = disp_mm.transpose(2, 1, 0, 3)
        for name in (f"field_{tool}.nii.gz", f"nrrd_{tool}.nrrd"):
            np.testing.assert_array_equal(array(name), wanted)
        whole = sitk.ReadTransform(str(tmp_path / f"composite_{tool}.h5"))
        place = (0.8 * 9, 0.8 * 5, 3.0)
        moved = np.subtract(whole.TransformPoint(place), place)
        np.testing.assert_allclose(moved, disp_mm[9, 5, 3], atol=1e-4)
