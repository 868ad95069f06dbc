"""Prunes, distils and quantises encoders: dense weights in, block-sparse int8 ONNX out."""
