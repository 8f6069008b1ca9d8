"""Files of ``torch.save``, read and rewritten without running anything that they contain."""
