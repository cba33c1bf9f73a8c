"""Built-in models: ``lenet`` holds ``Net``. ``networks.make_model`` creates the network that the settings name."""
