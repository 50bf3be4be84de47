"""The trajectory model, its recurrent layers, training and acting."""
