"""The product on GPUs, in Triton. Imported by dispatch.py when first used, never at package import."""
