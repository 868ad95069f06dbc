"""Imports ONNX models."""
