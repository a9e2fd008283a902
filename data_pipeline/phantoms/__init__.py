"""How the phantoms of `data_pipeline.synthetic` are painted."""
