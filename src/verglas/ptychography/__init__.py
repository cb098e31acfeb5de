"""Ptychography: the complex image of an object, and the light it was seen with, from many overlapping diffraction patterns.

Stands beside the cryo-EM packages, on `core`, `kernels`, `distributed` and `io`; neither side imports the other.
`scan.py` holds the data and the result, `model.py` predicts patterns, the engines fit.
"""
