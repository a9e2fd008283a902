"""Metrics written once more, as slowly and plainly as they are defined.

Python sets and loops; nothing here shares code with the package.
"""

import itertools
import math

import numpy as np


def voxels(labels, label):
    """Set of (x, y, z)."""
    shape = labels.shape
    return {i for i in itertools.product(*map(range, shape)) if labels[i] == label}


def dsc(a, b):
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else None


def surface(mask):
    """Voxels with one of six neighbours outside the set."""
    steps = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, -1)]
    return {
        v
        for v in mask
        if any(tuple(map(sum, zip(v, s, strict=True))) not in mask for s in steps)
    }


def surface_distances(a, b, spacing):
    """From each surface voxel of one to the nearest of the other, both ways."""
    a, b = surface(a), surface(b)

    def nearest(v, others):
        gaps = [
            sum(((p - q) * s) ** 2 for p, q, s in zip(v, w, spacing, strict=True))
            for w in others
        ]
        return math.sqrt(min(gaps)) if gaps else math.inf

    return [nearest(v, b) for v in a], [nearest(v, a) for v in b]


def percentile95(values):
    values = sorted(values)
    place = 0.95 * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def hd95(a, b, spacing):
    if not a or not b:
        return None
    return max(map(percentile95, surface_distances(a, b, spacing)))


def nsd(a, b, spacing, tolerance):
    if not a and not b:
        return None
    near = [d <= tolerance + 1e-4 for s in surface_distances(a, b, spacing) for d in s]
    return sum(near) / len(near)


def determinant3(rows):
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def jacobian(disp):
    """Central differences at interior voxels, voxel units."""
    out = {}
    for v in itertools.product(*(range(1, n - 1) for n in disp.shape[:3])):
        rows = []
        for i in range(3):
            row = []
            for axis in range(3):
                ahead, behind = list(v), list(v)
                ahead[axis] += 1
                behind[axis] -= 1
                slope = (disp[(*ahead, i)] - disp[(*behind, i)]) / 2
                row.append(float(slope) + (i == axis))
            rows.append(row)
        out[v] = determinant3(rows)
    return out


def tetrahedra(disp):
    """Six times the signed volumes of the ten tetrahedra at each interior voxel.

    Found without differences: all corners of a cube around the voxel are mapped, and
    the volume of each of its tetrahedra that has the voxel as a corner is compared with
    the tetrahedron's own orientation.
    """
    out = {}
    for v in itertools.product(*(range(1, n - 1) for n in disp.shape[:3])):
        v, found = np.array(v), []
        for signs in itertools.product((1, -1), repeat=3):
            corners = [v + np.eye(3, dtype=int)[i] * signs[i] for i in range(3)]
            found.append(_volume(disp, v, corners))
        for s in (1, -1):
            faces = [(s, s, 0), (0, s, s), (s, 0, s)]
            found.append(_volume(disp, v, [v + np.array(f) for f in faces]))
        out[tuple(v)] = found
    return out


def _volume(disp, corner, others):
    def place(v):
        return v + disp[tuple(v)].astype(float)

    before = determinant3([list(map(float, o - corner)) for o in others])
    after = determinant3([list(place(o) - place(corner)) for o in others])
    return after * math.copysign(1, before)


def signed_rank(differences):
    """Two-sided p by listing all signs; ranks by counting."""
    sizes = [abs(d) for d in differences]
    ranks = [
        sum(s < t for s in sizes) + (sum(s == t for s in sizes) + 1) / 2 for t in sizes
    ]
    up = sum(r for r, d in zip(ranks, differences, strict=True) if d > 0)
    center = sum(ranks) / 2
    sums = [
        sum(r for r, on in zip(ranks, signs, strict=True) if on)
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    as_far = sum(abs(s - center) >= abs(up - center) - 1e-9 for s in sums)
    return as_far / len(sums)
