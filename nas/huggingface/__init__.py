"""Models as Hugging Face keeps them: config.json and safetensors of other families, in and out.

transformers is imported by none of these files but `modeling_edgewise.py` and `configuration_edgewise.py`, which an
export carries with it.
"""
