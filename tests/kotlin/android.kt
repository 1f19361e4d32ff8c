// What the examples use of Android's framework, declared as android.jar does, over a folder of this machine.
package android.content

import android.content.res.AssetManager
import java.io.File

class Context(private val folder: File) {
    val assets: AssetManager = AssetManager(File(folder, "assets"))
    val filesDir: File = File(folder, "files").also { it.mkdirs() }
}
