"""How sure a model is: last-layer covariance, calibration on validation frames, and what to label next."""
