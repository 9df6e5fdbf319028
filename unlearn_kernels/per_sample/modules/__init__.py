"""What `PerSampleGradients` knows of each kind of module: what to keep of a call, and the verbs over it."""
