"""The notebook: magics, views and widgets; the only place that imports IPython, ipywidgets and anywidget."""
