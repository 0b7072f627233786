"""Devices, links and meshes as numbers."""
