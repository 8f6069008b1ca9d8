"""The embedded model ``mini``: its molecules, its pretraining data and the data that the demonstration tunes it on."""
