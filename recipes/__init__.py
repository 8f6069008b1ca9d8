"""How the data and the models that come with forcetune were made; not part of the installed package."""
