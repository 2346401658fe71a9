"""What programs beside this folder share: no programs themselves."""
